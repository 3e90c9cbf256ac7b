"""Owns what the ladder's numbers mean: medians and spreads, the limiter, and what to change about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from tools.measuring import Spread
from tools.turns import Turn

GPU_BOUND = 0.97  # end to end that comes so close to the model alone counts as bound by the model
CORES_BUSY = 0.9  # of the loader's share of cores: from here on there are none to spare
TITLES = {
    "read": "read bytes",
    "decode": "decode",
    "crops": "crops",
    "photometric": "photometric stage",
    "loader": "whole loader",
    "model": "model step alone",
    "end_to_end": "end to end",
}
LOADER_PARTS = ("read", "decode", "crops", "photometric")
Limiter = Literal["read", "decode", "crops", "photometric", "model", "sharing", "unknown"]


@dataclass(frozen=True)
class RungResult:
    """What the turns of one rung come to."""

    img_per_s: Spread
    cores: Spread
    gpu_busy: float | None  # 0 to 1
    gpu_memory_gib: float | None  # the highest, on the whole device
    parts: dict[str, float]  # seconds an image, by part of the work

    @staticmethod
    def of(turns: list[Turn]) -> RungResult:
        """Of at least one turn."""
        uses = [turn.gpu for turn in turns if turn.gpu is not None]
        parts = {name: Spread.of([turn.parts[name] / turn.images for turn in turns]).median for name in turns[0].parts}
        return RungResult(
            Spread.of([turn.img_per_s for turn in turns]),
            Spread.of([turn.cores for turn in turns]),
            Spread.of([use.busy for use in uses]).median if uses else None,
            max(use.memory_gib for use in uses) if uses else None,
            parts,
        )


@dataclass(frozen=True)
class Setting:
    """Under which the ladder was climbed, as far as advice depends on it."""

    on_gpu: bool
    decoder: Literal["mixed", "cpu"]
    cores: int  # the loader's share
    precision: str
    compiled: bool


@dataclass(frozen=True)
class Verdict:
    """What limits training."""

    limiter: Limiter
    gpu_bound: float | None  # end to end / model alone, median of the turns' ratios; None if either was left out
    gpu_bound_spread: Spread | None
    reason: str
    advice: tuple[str, ...]


def judge(results: dict[str, RungResult], turns: dict[str, list[Turn]], setting: Setting) -> Verdict:
    """Name the limiter. Ratios are taken turn by turn, as the rungs ran."""
    rates = {name: result.img_per_s.median for name, result in results.items()}
    parts = {name: rates[name] for name in LOADER_PARTS if name in rates}
    if "model" not in rates or "end_to_end" not in rates:
        if not parts:
            return Verdict("unknown", None, None, "too few rungs were measured to tell", ())
        slowest = _slowest(parts)
        reason = f"of the loader's parts {TITLES[slowest]} is the slowest; the model was not measured"
        return Verdict(slowest, None, None, reason, _advice(slowest, results, setting))
    pairs = zip(turns["end_to_end"], turns["model"], strict=True)
    bound = Spread.of([whole.img_per_s / alone.img_per_s for whole, alone in pairs])
    if bound.median >= GPU_BOUND:
        reason = f"end to end reaches {bound.median:.1%} of the model alone: the loader is not the limit"
        return Verdict("model", bound.median, bound, reason, _advice("model", results, setting))
    limiter: Limiter
    if "loader" in rates and rates["loader"] >= rates["model"]:
        limiter = "sharing"
        what = "the GPU and the CPU" if setting.on_gpu else "the cores"
        reason = (
            f"the loader alone makes {rates['loader']:.0f} images/s, more than the model's {rates['model']:.0f}, but "
            f"both need {what}: together they reach {bound.median:.1%} of the model alone"
        )
    elif parts:
        limiter = _slowest(parts)
        reason = (
            f"end to end reaches {bound.median:.1%} of the model alone, and of the loader's parts "
            f"{TITLES[limiter]} is the slowest"
        )
    else:
        return Verdict("unknown", bound.median, bound, "the loader's parts were not measured", ())
    return Verdict(limiter, bound.median, bound, reason, _advice(limiter, results, setting))


def _slowest(parts: dict[str, float]) -> Any:
    return min(parts, key=lambda name: parts[name])


def _advice(limiter: Limiter, results: dict[str, RungResult], setting: Setting) -> tuple[str, ...]:
    """What to change, the likeliest first."""
    loader = results.get("loader")
    full = loader is not None and loader.cores.median >= CORES_BUSY * setting.cores
    if setting.on_gpu:
        spare = "use --dali.decoder mixed" if setting.decoder == "cpu" else "raise --dali.hw-decoder-load"
        more = f"all {setting.cores} cores are busy: {spare}, or take more cores for each GPU"
    else:
        more = f"all {setting.cores} cores are busy: more of them, or a GPU, is what helps"
    cores = more if full else f"cores idle: raise --threads (now a share of {setting.cores})"
    tune = "profile_throughput.py --tune searches the loader's settings"
    match limiter:
        case "read":
            return (
                "put the shards on a faster or a local disk; --epoch-order blocks where random reads are slow",
                "raise --read-ahead and --threads",
            )
        case "decode":
            smaller = "write smaller pictures: make_shards.py --shorter-side 256 costs a little sharpness"
            return (tune, cores, smaller) if setting.on_gpu else (cores, smaller, tune)
        case "crops":
            return (cores, "write smaller pictures: make_shards.py --shorter-side 256 costs a little sharpness")
        case "photometric":
            return (
                cores,
                "fewer blurred views (--blur-prob) or a narrower --blur-radius are cheaper, and another recipe",
            )
        case "sharing":
            if setting.on_gpu:
                return (tune, "--dali.decoder cpu takes decoding off the GPU, if cores idle")
            return ("model and loader share the cores here: nothing but cheaper parts or a GPU helps",)
        case "model":
            faster = [] if setting.precision in ("bf16", "fp16") or not setting.on_gpu else ["--precision bf16"]
            faster += [] if setting.compiled or not setting.on_gpu else ["--compile"]
            return (*(f"{flag} makes the model faster" for flag in faster), "the loader needs nothing")
        case "unknown":
            return ()


def table(results: dict[str, RungResult]) -> str:
    """The ladder for people."""
    with_gpu = any(result.gpu_busy is not None for result in results.values())
    header = f"{'':20} {'images/s':>28} {'CPU cores':>10}"
    lines = [header + (f" {'GPU busy':>9} {'GPU memory':>11}" if with_gpu else "")]
    for name, result in results.items():
        line = f"{TITLES.get(name, name):20} {result.img_per_s!s:>28} {result.cores.median:10.2f}"
        if with_gpu and result.gpu_busy is not None and result.gpu_memory_gib is not None:
            line += f" {result.gpu_busy:9.0%} {result.gpu_memory_gib:7.1f} GiB"
        lines.append(line)
        if name == "model":
            whole = 1 / result.img_per_s.median
            lines += [
                f"  {part:18} {1 / seconds:28.4g} {seconds / whole:10.0%} of the step"
                for part, seconds in result.parts.items()
                if seconds > 0
            ]
        if name == "end_to_end" and "data_wait" in result.parts:
            lines.append(
                f"  {'data_wait':18} {'':28} {result.parts['data_wait'] * result.img_per_s.median:10.1%} of the time"
            )
    return "\n".join(lines)


def describe(verdict: Verdict) -> str:
    """The verdict for people."""
    lines = []
    if verdict.gpu_bound_spread is not None:
        lines.append(f"gpu_bound = end to end / model alone = {verdict.gpu_bound_spread}")
    lines.append(f"limiter: {TITLES.get(verdict.limiter, verdict.limiter)}: {verdict.reason}")
    lines += [f"  -> {advice}" for advice in verdict.advice]
    return "\n".join(lines)


def as_json(results: dict[str, RungResult], verdict: Verdict) -> dict[str, Any]:
    """For --json."""
    return {"rungs": {name: asdict(result) for name, result in results.items()}, "verdict": asdict(verdict)}
