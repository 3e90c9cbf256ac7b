"""What the measured stages mean: medians and spreads, the limiter, and what to change about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.common.measuring import Spread
from tools.common.plot_style import INK, QUIET
from tools.throughput.timing import Trial

LOADER_COLOUR, CHAIN_COLOUR, END_COLOUR, WARN_COLOUR = "#8fb3d9", "#1f5fa8", "#1d7a4f", "#b4511d"
MODEL_COLOURS = {"forward": "#d9a441", "backward": "#c07f1c", "optimizer": "#7a4f10"}
FAR = 3.0  # times the rate of the model: longer bars are cut off, so that the short ones can be compared
GPU_BOUND = 0.97  # end to end / model alone; from here on the model is the limiter
CORES_BUSY = 0.9  # share of the loader's cores; from here on no core is free
TITLES = {
    "read": "read bytes",
    "decode": "decode",
    "crops": "crops",
    "photometric": "photometric stage",
    "loader": "whole loader",
    "model": "model step alone",
    "host": "the host's launches",
    "end_to_end": "end to end",
}
HOST_BOUND = 0.9  # of a step's time that the host takes to launch it: from here on the GPU waits for launches
LOADER_PARTS = ("read", "decode", "crops", "photometric")
Limiter = Literal["read", "decode", "crops", "photometric", "model", "host", "sharing", "unknown"]


@dataclass(frozen=True)
class StageResult:
    """Medians and spreads over the trials of one stage."""

    img_per_s: Spread
    cores: Spread
    gpu_busy: float | None  # 0 to 1
    gpu_memory_gib: float | None  # highest, of the whole device
    parts: dict[str, float]  # seconds an image, by part of the work

    @staticmethod
    def of(trials: list[Trial]) -> StageResult:
        uses = [trial.gpu for trial in trials if trial.gpu is not None]
        parts = {
            name: Spread.of([trial.parts[name] / trial.images for trial in trials]).median for name in trials[0].parts
        }
        return StageResult(
            Spread.of([trial.img_per_s for trial in trials]),
            Spread.of([trial.cores for trial in trials]),
            Spread.of([use.busy for use in uses]).median if uses else None,
            max(use.memory_gib for use in uses) if uses else None,
            parts,
        )


@dataclass(frozen=True)
class Setting:
    """The measured configuration, as far as advice depends on it."""

    on_gpu: bool
    decoder: Literal["mixed", "cpu"]
    cores: int  # the loader's share
    precision: str
    compiled: bool


@dataclass(frozen=True)
class Verdict:
    """What limits training."""

    limiter: Limiter
    gpu_bound: float | None  # end to end / model alone, median over the rounds; None if either was left out
    gpu_bound_spread: Spread | None
    reason: str
    advice: tuple[str, ...]


def judge(results: dict[str, StageResult], trials: dict[str, list[Trial]], setting: Setting) -> Verdict:
    """Name the limiter. Ratios are those of trials of the same round."""
    rates = {name: result.img_per_s.median for name, result in results.items()}
    parts = {name: rates[name] for name in LOADER_PARTS if name in rates}
    if "model" not in rates or "end_to_end" not in rates:
        if not parts:
            return Verdict("unknown", None, None, "too few stages were measured", ())
        slowest = _slowest(parts)
        reason = f"of the loader's parts {TITLES[slowest]} is the slowest; the model was not measured"
        return Verdict(slowest, None, None, reason, _advice(slowest, results, setting))
    pairs = zip(trials["end_to_end"], trials["model"], strict=True)
    bound = Spread.of([whole.img_per_s / alone.img_per_s for whole, alone in pairs])
    host_bound = results["model"].parts.get("host", 0.0) * rates["model"]
    if bound.median >= GPU_BOUND and host_bound >= HOST_BOUND:
        reason = (
            f"the host takes {host_bound:.0%} of a step's time to launch it: the GPU waits for the host, not for data"
        )
        return Verdict("host", bound.median, bound, reason, _advice("host", results, setting))
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


def _advice(limiter: Limiter, results: dict[str, StageResult], setting: Setting) -> tuple[str, ...]:
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
            smaller = "write smaller images: make_shards.py --shorter-side 256 costs a little sharpness"
            return (tune, cores, smaller) if setting.on_gpu else (cores, smaller, tune)
        case "crops":
            return (cores, "write smaller images: make_shards.py --shorter-side 256 costs a little sharpness")
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
        case "host":
            compiled = () if setting.compiled else ("--compile makes fewer and larger kernels",)
            return (*compiled, "a larger batch a GPU; --one-pass on (the default) encodes all views at once")
        case "unknown":
            return ()


def table(results: dict[str, StageResult]) -> str:
    """A table for the terminal."""
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
    """The verdict as text."""
    lines = []
    if verdict.gpu_bound_spread is not None:
        lines.append(f"gpu_bound = end to end / model alone = {verdict.gpu_bound_spread}")
    lines.append(f"limiter: {TITLES.get(verdict.limiter, verdict.limiter)}: {verdict.reason}")
    lines += [f"  -> {advice}" for advice in verdict.advice]
    return "\n".join(lines)


def as_json(results: dict[str, StageResult], verdict: Verdict) -> dict[str, Any]:
    """The results as --json writes them."""
    return {"stages": {name: asdict(result) for name, result in results.items()}, "verdict": asdict(verdict)}


def draw_stages(results: dict[str, StageResult], verdict: Verdict, subtitle: str) -> Figure:
    """Bars of images/s from bytes (top) to end to end (bottom); whiskers from the slowest to the fastest trial."""
    figure = Figure(figsize=(9, 1.6 + 0.55 * len(results)), layout="constrained")
    axes = figure.subplots()
    medians = {name: result.img_per_s.median for name, result in results.items()}
    matter = [medians[name] for name in ("model", "end_to_end") if name in medians]
    edge = FAR * max(matter) if matter else max(medians.values())
    edge = min(edge, 1.05 * max(medians.values()))
    for row, (name, result) in enumerate(results.items()):
        _draw_bar(axes, row, name, result, edge, limits=name == verdict.limiter)
    if "model" in medians:
        axes.axvline(medians["model"], color=INK, linewidth=1, linestyle="--", zorder=0)
    axes.set_yticks(range(len(results)), [TITLES.get(name, name) for name in results])
    for label, name in zip(axes.get_yticklabels(), results, strict=True):
        label.set_fontweight("bold" if name not in LOADER_PARTS else "normal")
    axes.invert_yaxis()
    axes.set_xlim(0, edge * 1.28)
    axes.set_xlabel(
        "source images per second; dashed: the model alone" if "model" in medians else "source images per second"
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    bound = "" if verdict.gpu_bound is None else f"gpu_bound {verdict.gpu_bound:.2f}, "
    figure.suptitle(
        f"{bound}limiter: {TITLES.get(verdict.limiter, verdict.limiter)}", fontsize=13, color=INK, x=0.02, ha="left"
    )
    axes.set_title(subtitle, fontsize=9, color=QUIET, loc="left")
    return figure


def _draw_bar(axes: Axes, row: int, name: str, result: StageResult, edge: float, limits: bool) -> None:
    rate = result.img_per_s
    shown = min(rate.median, edge)
    broken = rate.median > edge
    if name == "model" and result.parts:
        parts = {part: seconds for part, seconds in result.parts.items() if part in MODEL_COLOURS}
        whole = sum(parts.values())
        start = 0.0
        for part, seconds in parts.items():
            width = shown * seconds / whole
            axes.barh(row, width, left=start, color=MODEL_COLOURS[part], height=0.62)
            if width > 0.09 * edge:
                axes.text(start + width / 2, row, part, ha="center", va="center", fontsize=8, color="white")
            start += width
    else:
        colour = {"loader": CHAIN_COLOUR, "end_to_end": END_COLOUR}.get(name, LOADER_COLOUR)
        axes.barh(row, shown, color=WARN_COLOUR if limits else colour, height=0.62)
    if broken:
        axes.text(shown, row, "»", ha="right", va="center", fontsize=14, color="white", fontweight="bold")
    else:
        whiskers = [[rate.median - rate.minimum], [max(min(rate.maximum, edge) - rate.median, 0)]]
        axes.errorbar(shown, row, xerr=whiskers, color=INK, linewidth=1, capsize=3)
    text = f"{rate.median:,.0f}  ·  {result.cores.median:.1f} cores"
    if result.gpu_busy is not None:
        text += f"  ·  GPU {result.gpu_busy:.0%}"
    axes.text(max(shown, min(rate.maximum, edge)) + 0.012 * edge, row, text, va="center", fontsize=9, color=INK)
