"""Does a long run grow? python benchmarks/soak.py OUT

Trains a tiny model on synthetic images for as many steps as an ImageNet run takes in hours (12,000 an hour at 1,700
images/s and a batch of 512), with checkpoints, kNN and bad samples. The run is stopped by SIGTERM in the middle and
resumed. At regular steps its memory, open files, threads and the disk use of its checkpoints are read from outside.
The first quarter of either session is its warm-up. Exit code 1 if one of them grows: if its median over the last
quarter of the steps exceeds that over the second quarter by more than the allowance, or if the slope of the memory
after the warm-up may be steeper than --max-mb-per-minute.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.common.errors import UserError, exit_on_user_error
from pipeline.common.locations import LocalPath
from pipeline.dataset.dataset import ShardSet
from pipeline.loader.bad_samples import BAD_SAMPLES_FILE
from pipeline.sharding.make_dataset import make_dataset
from pipeline.sharding.options import ShardingOptions
from tools.common.measuring import describe_machine, write_results
from train.distributed.stop_signals import EXIT_PREEMPTED
from train.storage.run_folder import METRICS_FILE, read_lines

ROOT = Path(__file__).resolve().parent.parent
TRAINER = (sys.executable, str(ROOT / "train" / "pretrain.py"))
POLL_S = 0.02  # interval of reading metrics.jsonl
BATCH, SIDE, KEEP = 8, 16, 2  # images a step; px of a view; checkpoints kept
COLOURS = ("#1f5fa8", "#1d7a4f")  # of the sessions
MIB = 1 << 20
MB_PER_MIB = MIB / 1e6
IMAGENET_STEPS_PER_MINUTE = 200  # 1,700 images/s, batch 512
BLOCKS = 10  # of the steps after the warm-up; the line goes through their medians
T_QUANTILE = 2.306  # 97.5 % of Student's t with BLOCKS - 2 degrees of freedom: an interval of 95 %
SHORTEST_MIN = 5.0  # no slope is judged by fewer minutes: memory grows in jumps, which would decide it


@dataclass(frozen=True)
class Config:
    """Flags of soak.py."""

    out: Annotated[LocalPath, tyro.conf.Positional]
    """New folder for the dataset, the run, soak.json and soak.png."""
    steps: int = 24_000
    """Steps of both sessions together; 24,000 are two hours on ImageNet."""
    sample_every: int = 50
    """Steps between two samples."""
    num_images: int = 512
    """Images of the dataset."""
    bad: int = 8
    """Number of images whose bytes change after sharding."""
    checkpoint_every: int = 200
    """Steps between two checkpoints."""
    knn_every: int = 5
    """Epochs between two kNN accuracies."""
    backend: Literal["auto", "dali", "torchvision"] = "auto"
    """Back end of the loader."""
    threads: int = 1
    """Threads of the loader and of the model."""
    max_mb_per_minute: float = 0.1
    """Steepest slope of the anonymous memory, in MB (1e6 bytes) a minute at the pace of this run."""


@dataclass(frozen=True)
class Sample:
    """Resources of the process after a step."""

    session: int  # 0: before the stop, 1: after it
    step: int
    seconds: float  # since the session was started
    own_mib: float  # anonymous memory, which other processes cannot change
    rss_mib: float  # with the pages of mapped files
    files: int  # open descriptors
    threads: int
    checkpoints_mib: float  # disk use of the checkpoints
    other_mib: float  # disk use of the rest of the run folder, which records every logged step


@dataclass(frozen=True)
class Quantity:
    """A resource that must not grow, and the allowed difference of two medians."""

    field: str
    title: str
    unit: str
    allowance: float


QUANTITIES = (
    Quantity("own_mib", "anonymous memory", "MiB", 16.0),
    Quantity("rss_mib", "resident memory", "MiB", 16.0),
    Quantity("files", "open files", "", 1.0),
    Quantity("threads", "threads", "", 1.0),
    Quantity("checkpoints_mib", "checkpoints on disk", "MiB", 0.1),
)


@dataclass(frozen=True)
class Growth:
    """One quantity in one session: medians over the second and the last quarter of its steps."""

    session: int
    quantity: Quantity
    second: float
    last: float

    @property
    def grew(self) -> bool:
        return self.last - self.second > self.quantity.allowance


@dataclass(frozen=True)
class Slope:
    """A line through the anonymous memory of one session after its warm-up, in MB (1e6 bytes)."""

    session: int
    first_step: int  # of the line
    start_mb: float  # its value there
    mb_per_step: float
    error: float  # half of the interval of 95 % about it
    steps: int
    minutes: float

    @property
    def steps_per_minute(self) -> float:
        return self.steps / self.minutes

    def may_exceed(self, mb_per_minute: float) -> bool:
        """Whether the interval reaches above a limit; false for a session too short to be judged."""
        steepest = (self.mb_per_step + self.error) * self.steps_per_minute
        return self.minutes >= SHORTEST_MIN and steepest > mb_per_minute


def main() -> None:
    """The command."""
    config = tyro.cli(Config, description=__doc__)
    if not Path("/proc/self/smaps_rollup").exists():
        raise UserError("this benchmark reads Linux's /proc/PID/smaps_rollup, which is not here")
    if config.out.exists():
        raise UserError(f"{config.out} exists: name a new folder")
    if config.steps < 8 * max(5 * config.sample_every, (KEEP + 1) * config.checkpoint_every):
        raise UserError(
            f"--steps {config.steps}: a quarter of a session must hold five samples (--sample-every "
            f"{config.sample_every}) and {KEEP + 1} checkpoints (--checkpoint-every {config.checkpoint_every})"
        )
    print(describe_machine(), flush=True)
    data = make_data(config)
    start_s = time.perf_counter()
    samples = soak(config, data)
    minutes = (time.perf_counter() - start_s) / 60
    growths, slopes = compare(samples), fit(samples)
    knn = sum("knn_top1" in line for line in read_lines(config.out / "run" / METRICS_FILE))
    bad = len(read_lines(config.out / "run" / BAD_SAMPLES_FILE, "sample"))
    text = f"{config.steps:,} steps in {minutes:.1f} minutes, {knn} kNN evaluations, {bad} bad samples of {config.bad}"
    print(text)
    print(table(samples, growths))
    print(slope_table(slopes, config.max_mb_per_minute))
    draw(samples, slopes, config.max_mb_per_minute, text).savefig(config.out / "soak.png", dpi=110)
    results = {"told": text, "slopes": [asdict(s) for s in slopes], "samples": [asdict(s) for s in samples]}
    write_results(config.out / "soak.json", results)
    steep = any(slope.may_exceed(config.max_mb_per_minute) for slope in slopes)
    if steep or any(growth.grew for growth in growths) or bad != config.bad:
        print("something grew, or a bad sample was not found")
        sys.exit(1)
    print("nothing grew")


def make_data(config: Config) -> Path:
    """Write a dataset of synthetic images, and change the bytes of some."""
    path = config.out / "data"
    options = ShardingOptions(samples_per_shard=100)
    make_dataset(f"synthetic:{config.num_images}", path, options, quiet=True, in_process=True)
    dataset = ShardSet.open(path)
    for sample in np.linspace(0, config.num_images - 1, config.bad).astype(int).tolist():
        row = dataset.samples[sample]
        with open(dataset.shard_path(int(row["shard"])), "r+b") as file:
            file.seek(int(row["offset"]) + 100)
            file.write(b"rotten")
    return path


def soak(config: Config, data: Path) -> list[Sample]:
    """Run both sessions. Raises UserError if the trainer ends otherwise than expected."""
    run_dir, every = config.out / "run", config.sample_every
    epochs = -(-config.steps // (config.num_images // BATCH))
    words = ["--data", data, "--run-dir", run_dir, "--backbone", "resnet_tiny", "--image-size", SIDE, "--dim", 64]
    words += ["--projector-hidden", 64, "--predictor-hidden", 16, "--global-batch", BATCH, "--device", "cpu"]
    words += ["--epochs", epochs, "--max-steps", config.steps, "--log-every", every, "--backend", config.backend]
    words += ["--checkpoint-every", f"{config.checkpoint_every}steps", "--keep-checkpoints", KEEP]
    words += ["--knn-every", config.knn_every, "--threads", config.threads, "--resume"]
    command = [*TRAINER, *map(str, words)]
    samples: list[Sample] = []
    for session, stop_at, expected in ((0, config.steps // 2, EXIT_PREEMPTED), (1, None, 0)):
        code = watch(command, run_dir, session, stop_at, samples, config.threads)
        if code != expected:
            log = (run_dir.parent / f"session{session}.log").read_text()
            raise UserError(f"session {session} ended with exit code {code} instead of {expected}:\n{log[-2000:]}")
    return samples


def watch(
    command: list[str], run_dir: Path, session: int, stop_at: int | None, samples: list[Sample], threads: int
) -> int:
    """Run one session, sampled at every line of metrics.jsonl; SIGTERM after step ``stop_at``. Gives its exit code."""
    seen, start_s = newest_step(run_dir), time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(run_dir.parent / f"session{session}.log", "wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            while process.poll() is None:
                step = newest_step(run_dir)
                if step > seen:
                    seen = step
                    sample = sample_of(process.pid, run_dir, session, step, time.perf_counter() - start_s)
                    if sample is not None:
                        samples.append(sample)
                    if stop_at is not None and step >= stop_at:
                        process.send_signal(signal.SIGTERM)
                        stop_at = None
                time.sleep(POLL_S)
        finally:
            process.kill()
            process.wait()
    return process.returncode


def newest_step(run_dir: Path) -> int:
    """The last step in metrics.jsonl, read from its end; 0 before the first."""
    try:
        with open(run_dir / METRICS_FILE, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().rpartition(b"\n")[0].splitlines()
    except FileNotFoundError:
        return 0
    return int(lines[-1].partition(b'"step": ')[2].partition(b",")[0]) if lines else 0


def sample_of(pid: int, run_dir: Path, session: int, step: int, seconds: float) -> Sample | None:
    """The resources of a running process; None if it has ended."""
    proc = Path("/proc") / str(pid)
    try:
        rollup = dict(line.split(":", 1) for line in (proc / "smaps_rollup").read_text().splitlines()[1:])
        files = len(os.listdir(proc / "fd"))
        threads = len(os.listdir(proc / "task"))
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    own, rss = (int(rollup[name].split()[0]) / 1024 for name in ("Anonymous", "Rss"))
    checkpoints = disk_use(run_dir / "checkpoints")
    return Sample(session, step, seconds, own, rss, files, threads, checkpoints, disk_use(run_dir) - checkpoints)


def disk_use(folder: Path) -> float:
    """MiB of the files below a folder; files that are removed meanwhile are not counted."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(place, name)).st_size
            except FileNotFoundError:
                continue
    return total / MIB


def by_session(samples: list[Sample]) -> list[list[Sample]]:
    """The samples of each session."""
    sessions = sorted({sample.session for sample in samples})
    return [[sample for sample in samples if sample.session == session] for session in sessions]


def compare(samples: list[Sample]) -> list[Growth]:
    """Every quantity in every session. Raises UserError for a session too short to compare."""
    growths = []
    for mine in by_session(samples):
        session = mine[0].session
        first, width = mine[0].step, (mine[-1].step - mine[0].step) / 4
        second = [s for s in mine if width <= s.step - first < 2 * width]
        last = [s for s in mine if s.step - first >= 3 * width]
        if min(len(second), len(last)) < 2:
            raise UserError(f"session {session} has {len(mine)} samples, too few to compare its quarters: more --steps")
        for quantity in QUANTITIES:
            values = [statistics.median(getattr(s, quantity.field) for s in part) for part in (second, last)]
            growths.append(Growth(session, quantity, *values))
    return growths


def fit(samples: list[Sample]) -> list[Slope]:
    """The slope of each session, by least squares through the medians of BLOCKS equal stretches after the warm-up.

    Medians leave out the peaks of evaluations and checkpoints. Neighbouring samples are alike, so the interval from
    single samples would be too narrow. Raises UserError for a session of too few samples.
    """
    slopes = []
    for mine in by_session(samples):
        start = mine[0].step + (mine[-1].step - mine[0].step) / 4
        warm = [sample for sample in mine if sample.step >= start]
        if len(warm) < BLOCKS:
            raise UserError(f"session {mine[0].session} has {len(mine)} samples, too few for a slope: more --steps")
        blocks = [warm[block * len(warm) // BLOCKS : (block + 1) * len(warm) // BLOCKS] for block in range(BLOCKS)]
        steps = np.array([statistics.mean(sample.step for sample in block) for block in blocks])
        memory = np.array([statistics.median(sample.own_mib for sample in block) for block in blocks]) * MB_PER_MIB
        centred = steps - steps.mean()
        slope = float(centred @ memory / (centred @ centred))
        rest = memory - memory.mean() - slope * centred
        error = float(np.sqrt(rest @ rest / (BLOCKS - 2) / (centred @ centred)))
        first, last = warm[0], warm[-1]
        start_mb = float(memory.mean() + slope * (first.step - steps.mean()))
        taken, minutes = last.step - first.step, (last.seconds - first.seconds) / 60
        slopes.append(Slope(first.session, first.step, start_mb, slope, T_QUANTILE * error, taken, minutes))
    return slopes


def slope_table(slopes: list[Slope], limit: float) -> str:
    """The slopes at the pace of this run, which is judged, by the step, and at ImageNet's pace."""
    heads = ("a minute", "1,000 steps", "an ImageNet minute")
    lines = [f"{'memory slope, MB per':22} {'session':>8} " + " ".join(f"{head:>18}" for head in heads)]
    for slope in slopes:
        scales = (slope.steps_per_minute, 1000, IMAGENET_STEPS_PER_MINUTE)
        cells = (f"{slope.mb_per_step * steps:+.3f} +- {slope.error * steps:.3f}" for steps in scales)
        verdict = f"allowed +{limit:g}"
        if slope.minutes < SHORTEST_MIN:
            verdict = f"not judged: {slope.minutes:.1f} of {SHORTEST_MIN:g} minutes"
        elif slope.may_exceed(limit):
            verdict += " GREW"
        lines.append(f"{'':22} {slope.session + 1:8d} " + " ".join(f"{cell:>18}" for cell in cells) + f" {verdict}")
    paces = ", ".join(f"{slope.steps:,} steps in {slope.minutes:.1f} minutes" for slope in slopes)
    lines.append(f"after the warm-up: {paces}; intervals of 95 %")
    return "\n".join(lines)


def table(samples: list[Sample], growths: list[Growth]) -> str:
    """The result as a table."""
    lines = [f"{'':22} {'session':>8} {'second quarter':>15} {'last quarter':>13} {'allowed':>8}"]
    for growth in sorted(growths, key=lambda growth: (growth.quantity.field, growth.session)):
        quantity = growth.quantity
        name = f"{quantity.title}{f', {quantity.unit}' if quantity.unit else ''}"
        verdict = "GREW" if growth.grew else ""
        lines.append(
            f"{name:22} {growth.session + 1:8d} {growth.second:15.1f} {growth.last:13.1f} "
            f"{f'+{quantity.allowance:g}':>8} {verdict}"
        )
    lines.append(f"metrics and TensorBoard at the end: {samples[-1].other_mib:.2f} MiB, which grow by design")
    return "\n".join(lines)


def draw(samples: list[Sample], slopes: list[Slope], limit: float, subtitle: str) -> Figure:
    """The memory close up with its slopes, then a panel for each quantity; the sessions in two colours."""
    figure = Figure(figsize=(8, 11), layout="constrained")
    shown = [quantity for quantity in QUANTITIES if quantity.field != "rss_mib"]
    close_up, *panels = figure.subplots(1 + len(shown), 1, sharex=True)
    draw_slopes(close_up, samples, slopes, limit)
    for axes, quantity in zip(panels, shown, strict=True):
        for mine, colour in zip(by_session(samples), COLOURS, strict=False):
            values = [getattr(sample, quantity.field) for sample in mine]
            axes.plot([sample.step for sample in mine], values, color=colour, linewidth=1)
        axes.set_ylim(0, 1.15 * max(getattr(sample, quantity.field) for sample in samples))
        axes.set_ylabel(f"{quantity.title}\n({quantity.unit})" if quantity.unit else quantity.title)
    for axes in (close_up, *panels):
        axes.grid(color="#e4e7ea", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("optimizer steps; stopped by SIGTERM and resumed where the colour changes")
    figure.suptitle(f"A long run, watched from outside\n{subtitle}", fontsize=11)
    return figure


def draw_slopes(axes: Axes, samples: list[Sample], slopes: list[Slope], limit: float) -> None:
    """The memory of each session less the start of its line; the lines, and beside each the steepest allowed."""
    for mine, slope, colour in zip(by_session(samples), slopes, COLOURS, strict=False):
        values = [sample.own_mib * MB_PER_MIB - slope.start_mb for sample in mine]
        axes.plot([sample.step for sample in mine], values, color=colour, linewidth=1)
        steps = np.array([0, slope.steps])
        axes.plot(slope.first_step + steps, slope.mb_per_step * steps, color="black", linewidth=1.5)
        allowed = limit / slope.steps_per_minute * steps
        axes.plot(slope.first_step + steps, allowed, color="black", linewidth=1.5, linestyle=":")
    axes.set_ylim(-15, 15)
    axes.set_ylabel("anonymous memory\nclose up (MB)")
    axes.set_title(f"line: slope after the warm-up; dotted: {limit:g} MB a minute", fontsize=9, loc="left")


if __name__ == "__main__":
    exit_on_user_error(main)
