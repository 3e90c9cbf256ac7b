"""The GPU suite's report: markdown tables of all that was measured."""

from __future__ import annotations

from typing import Any

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


def markdown(results: dict[str, Any]) -> str:
    """The whole report."""
    lines = ["# GPU suite" + (" (toy size: the numbers mean nothing)" if results["toy"] else ""), ""]
    lines += [f"- {name}: {value}" for name, value in results["machine"].items()]
    lines += ["", "Source images per second: median (slowest .. fastest trial)."]
    for name, part in results["parts"].items():
        lines += ["", f"## {HEADINGS.get(name, name)}", ""]
        if name == "parity":
            lines += _parity(part)
        elif name == "roofline":
            lines += _roofline(part)
        elif name in ("launches", "cuda-graph"):
            lines += _numbers(part)
        elif "stages" in part:
            lines += _rates({TITLES.get(stage, stage): value for stage, value in part["stages"].items()})
            verdict = part.get("verdict")
            if verdict is not None:
                bound = "" if verdict["gpu_bound"] is None else f"gpu_bound {verdict['gpu_bound']:.3f}; "
                lines += ["", f"{bound}limiter: {verdict['limiter']}: {verdict['reason']}"]
        else:
            lines += _rates(part)
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
    lines = [
        f"Copy {rates['copy_gb_s']:,.0f} GB/s, bf16 matmul {rates['matmul_tflop_s']:,.0f} TFLOP/s.",
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


def _numbers(part: dict[str, Any]) -> list[str]:
    """A column for each number of the first row that has some."""
    columns = next((list(value) for value in part.values() if not value.keys() & {"failed", "skipped"}), [])
    lines = ["| | " + " | ".join(columns) + " |", "|-" * (1 + len(columns)) + "|"]
    for name, value in part.items():
        cells = (
            [f"{value[column]:,.4g}" for column in columns] if columns and columns[0] in value else [_why_not(value)]
        )
        lines.append(f"| {name} | " + " | ".join(cells + [""] * (len(columns) - len(cells))) + " |")
    return lines


def _rates(part: dict[str, Any]) -> list[str]:
    lines = [
        "| | images/s | CPU cores | GPU busy | memory GiB | forward / backward / optimizer ms an image |",
        "|-|-|-|-|-|-|",
    ]
    for name, value in part.items():
        if "img_per_s" not in value:
            lines.append(f"| {name} | {_why_not(value)} | | | | |")
            continue
        busy = "" if value["gpu_busy"] is None else f"{value['gpu_busy']:.0%}"
        memory = value.get("torch_memory_gib") or value["gpu_memory_gib"]
        steps = [value["parts"].get(step) for step in ("forward", "backward", "optimizer")]
        parts = " / ".join(f"{1e3 * step:.3f}" for step in steps if step is not None)
        lines.append(
            f"| {name} | {Spread(**value['img_per_s'])} | {value['cores']['median']:.1f} | {busy} | "
            f"{'' if memory is None else f'{memory:.1f}'} | {parts} |"
        )
    return lines


def _why_not(value: dict[str, Any]) -> str:
    return f"failed: {value['failed']}" if "failed" in value else value.get("skipped", "?")
