"""The GPU suite's report: markdown tables of all that was measured."""

from __future__ import annotations

from typing import Any

from gpu_bench import NEEDS_GPU

from tools.common.measuring import Spread
from tools.throughput.report import TITLES

HEADINGS = {
    "parity": "Parity with torchvision (absolute difference, of 255)",
    "roofline": "What bytes and FLOPs allow the eager step",
    "stages": "The stages, eager",
    "stages-compiled": "The stages, compiled model",
    "decode": "Decode alone, by placement",
    "loader": "Whole loader, by placement",
    "model": "Model step alone, eager",
    "compiled": "Model step alone, compiled",
    "launches": "Launches of a step, and the time of host and device",
    "cuda-graph": "Whole runs with a CUDA graph and without",
    "official": "The official recipe on this machine",
}
RATES = """\
Source images per second: median (slowest .. fastest trial). The roofline is the rate at which the step's bytes or its
FLOPs, whichever takes longer, go at the measured speed of copies and matmuls; beside it the share that is reached.
Bytes are those of the eager step: a compiled one moves fewer, and may reach more than 100 %."""
OF_A_STEP = ("model", "end_to_end")  # the stages in which the model makes steps
# What a CPU stands in for, or does not have; the number that it gives is not shown.
OF_A_GPU = ("launches", "host_ms", "kernels_ms", "host_bound")


def markdown(results: dict[str, Any]) -> str:
    """The whole report."""
    toy = results["toy"]
    lines = ["# GPU suite" + (" (toy size on a CPU: the numbers mean nothing)" if toy else ""), ""]
    lines += [f"- {name}: {value}" for name, value in results["machine"].items()]
    lines += ["", RATES]
    for name, part in results["parts"].items():
        lines += ["", f"## {HEADINGS.get(name, name)}", ""]
        if name == "parity":
            lines += _parity(part)
        elif name == "roofline":
            lines += _roofline(part)
        elif name in ("launches", "cuda-graph"):
            lines += _numbers(part, toy)
        elif "stages" in part:
            limits = {stage: part.get("roofline") for stage in OF_A_STEP}
            stages = {stage: {**value, "roofline": limits.get(stage, {})} for stage, value in part["stages"].items()}
            lines += _rates({TITLES.get(stage, stage): value for stage, value in stages.items()}, toy)
            verdict = part.get("verdict")
            if verdict is not None:
                bound = "" if verdict["gpu_bound"] is None else f"gpu_bound {verdict['gpu_bound']:.3f}; "
                bound = f"gpu_bound {NEEDS_GPU}; " if toy else bound
                lines += ["", f"{bound}limiter: {verdict['limiter']}: {verdict['reason']}"]
        else:
            of_a_step = name not in ("decode", "loader")
            lines += _rates(part if of_a_step else {row: {**value, "roofline": {}} for row, value in part.items()}, toy)
    if results["failures"]:
        lines += ["", "## Failures", "", *(f"- {name}: {why}" for name, why in results["failures"].items())]
    return "\n".join(lines) + "\n"


def _parity(part: dict[str, Any]) -> list[str]:
    lines = ["| views | mean | 99 % | max | within 4 |", "|-|-|-|-|-|"]
    for name, value in part.items():
        if "mean" in value:
            lines.append(
                f"| {name} | {value['mean']:.3f} | {value['p99']:.2f} | {value['max']:.0f} | {value['within_4']:.2%} |"
            )
        else:
            lines.append(f"| {name} | {_why_not(value)} | | | |")
    return lines


def _roofline(part: dict[str, Any]) -> list[str]:
    rates = part.get("machine", {})
    if "copy_gb_s" not in rates:
        return [_why_not(rates)]
    matmul = ", ".join(f"{name} {rate:,.4g}" for name, rate in rates["matmul_tflop_s"].items())
    lines = [
        f"Copy {rates['copy_gb_s']:,.0f} GB/s, matmul in TFLOP/s: {matmul}.",
        "",
        "| step | GB | TFLOP | bytes, ms | FLOPs, ms | images/s at most |",
        "|-|-|-|-|-|-|",
    ]
    for name, value in part.items():
        if "step_gb" in value:
            numbers = [value[key] for key in ("step_gb", "step_tflop", "bytes_ms", "flops_ms", "most_img_per_s")]
            lines.append(f"| {name} | " + " | ".join(f"{number:,.4g}" for number in numbers) + " |")
        elif name != "machine":
            lines.append(f"| {name} | {_why_not(value)} | | | | |")
    return lines


def _share(reached: float, limits: dict[str, Any] | None) -> str:
    """The roofline and the share of it; ``limits`` None: not counted, empty: of no step."""
    if not limits or "most_img_per_s" not in limits:
        return "no step" if limits == {} else "not counted"
    most = limits["most_img_per_s"]
    return f"{most:,.4g}, {reached / most:.0%}"


def _numbers(part: dict[str, Any], toy: bool) -> list[str]:
    """A column for each number of the first row that has some."""
    measured = [value for value in part.values() if not value.keys() & {"failed", "skipped"}]
    columns = [column for column in (measured[0] if measured else {}) if column != "roofline"]
    lines = ["| | " + " | ".join([*columns, "roofline"]) + " |", "|-" * (2 + len(columns)) + "|"]
    for name, value in part.items():
        if "img_per_s" not in value:
            cells = [_why_not(value)] + [""] * len(columns)
        elif toy and "--cuda-graph" in name:  # the run made ordinary steps
            cells = [NEEDS_GPU] + [""] * len(columns)
        else:
            cells = [NEEDS_GPU if toy and column in OF_A_GPU else f"{value[column]:,.4g}" for column in columns]
            cells.append(_share(value["img_per_s"], value.get("roofline")))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _rates(part: dict[str, Any], toy: bool) -> list[str]:
    lines = [
        "| | images/s | roofline | CPU cores | GPU busy | memory GiB | forward / backward / optimizer ms an image |",
        "|-|-|-|-|-|-|-|",
    ]
    for name, value in part.items():
        if "img_per_s" not in value:
            lines.append(f"| {name} | {_why_not(value)} | | | | | |")
            continue
        rate = Spread(**value["img_per_s"])
        busy = "" if value["gpu_busy"] is None else f"{value['gpu_busy']:.0%}"
        memory = value.get("torch_memory_gib") or value["gpu_memory_gib"]
        on_gpu = [busy, "" if memory is None else f"{memory:.1f}"] if not toy else [NEEDS_GPU, NEEDS_GPU]
        steps = [value["parts"].get(step) for step in ("forward", "backward", "optimizer")]
        parts = " / ".join(f"{1e3 * step:.3f}" for step in steps if step is not None)
        cells = [str(rate), _share(rate.median, value.get("roofline")), f"{value['cores']['median']:.1f}", *on_gpu]
        lines.append(f"| {name} | " + " | ".join([*cells, parts]) + " |")
    return lines


def _why_not(value: dict[str, Any]) -> str:
    return f"failed: {value['failed']}" if "failed" in value else value.get("skipped", "?")
