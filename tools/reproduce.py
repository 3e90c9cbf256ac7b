"""Repeat one of the paper's experiments at the scale of this machine.

    python tools/reproduce.py TABLE --data DIR --val-data DIR --budget MINUTES

Every variant of the table is a run of train/pretrain.py and one of train/linear.py, all alike but for the flags that
the table is about. A short pilot is timed, and all variants get as many epochs as fit into the budget together. Then
TABLE.md and TABLE.png are written. The same command goes on where a stopped sweep was.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import tyro

from pipeline.disk import disk_errors, write_json
from pipeline.errors import UserError, exit_on_user_error
from pipeline.location import LocalPath
from pipeline.shards import ShardSet
from tools.paper_tables import TABLES, PaperTable, Variant
from tools.reproduce_report import write_report
from tools.reproduce_scale import (
    LINEAR_RATES,
    PILOT_STEPS,
    RECIPES,
    Pilot,
    Scale,
    choose_recipe,
    fit_epochs,
    fitting,
    knn_every,
)
from train.metrics import METRICS_FILE, read_lines
from train.report import SUMMARY_FILE

ROOT = Path(__file__).resolve().parents[1]
PRETRAIN, LINEAR = ROOT / "train" / "pretrain.py", ROOT / "train" / "linear.py"
SCALE_FILE, PILOT_FILE = "scale.json", "pilot.json"
PILOT_LOG_EVERY = 4  # steps; the first lines, while everything warms up, are left out
EXIT_STOPPED = 75  # as train/pretrain.py: the same command goes on


@dataclass(frozen=True)
class ReproduceConfig:
    """Repeat one of the paper's experiments at the scale of this machine."""

    table: Annotated[str, tyro.conf.Positional]
    """stop-gradient, predictor, batch-size, bn, similarity, symmetrisation, alternation, moving-average or
    output-dimension."""
    data: Path
    """Labelled dataset to train on."""
    val_data: Path
    """Labelled dataset to measure on, of the same classes."""
    budget: float
    """Minutes for the whole sweep."""
    out: LocalPath | None = None
    """Folder of the runs; default: runs/reproduce/TABLE. A sweep that is there goes on."""
    docs: LocalPath | None = None
    """Folder for TABLE.md and TABLE.png; default: that of the runs."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: the GPUs if there are any."""
    processes: int = 0
    """Processes of each run; 0: one for each GPU, or one."""
    seed: int = 0
    """Of weights, order and views of every run."""


def main() -> None:
    """The command."""
    config = tyro.cli(ReproduceConfig, description=__doc__)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        reproduce(config)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(EXIT_STOPPED)


def reproduce(config: ReproduceConfig) -> None:
    """The sweep and its report. Raises UserError for mistakes."""
    table = choose_table(config)
    train, val = ShardSet.open(config.data), ShardSet.open(config.val_data)
    for flag, dataset in (("--data", train), ("--val-data", val)):
        if not dataset.has_labels:
            raise UserError(f"{flag} {dataset.path} has no labels, and accuracies need them: shard it with labels")
    out = config.out or Path("runs") / "reproduce" / config.table
    device, processes = choose_device(config)
    sweep = Sweep(config, out, train, device, processes)
    scale = sweep.settle_scale(table, val)
    variants = fitting(table, train.num_samples)
    for number, variant in enumerate(variants, 1):
        print(f"\n== {number} of {len(variants)}: {variant.label}", flush=True)
        sweep.run(variant, scale)
    page = write_report(
        table,
        variants,
        {variant.name: out / variant.name for variant in variants},
        folder=config.docs or out,
        name=config.table,
        recipe=RECIPES[scale.recipe].name,
        val_samples=val.num_samples,
        command=command_of(config),
    )
    print(f"\n{page}\n{page.with_suffix('.png')}")


def choose_table(config: ReproduceConfig) -> PaperTable:
    """Raises UserError for an unknown table, or a budget that is none."""
    if config.table not in TABLES:
        known = "\n".join(f"  {name:<17} {table.title} ({table.source})" for name, table in TABLES.items())
        raise UserError(f"table {config.table} is unknown; known are\n{known}")
    if not config.budget > 0:
        raise UserError(f"--budget {config.budget:g}: give the minutes that the sweep may take")
    return TABLES[config.table]


def choose_device(config: ReproduceConfig) -> tuple[str, int]:
    """``cuda`` or ``cpu``, and how many processes a run has. Raises UserError for what is not there."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() and config.device != "cpu" else 0
    if config.device == "cuda" and gpus == 0:
        raise UserError("--device cuda, but PyTorch finds no GPU here: take --device cpu")
    if config.processes < 0:
        raise UserError(f"--processes {config.processes}: it must be at least 1, or 0 for one a GPU")
    return ("cuda" if gpus else "cpu"), config.processes or max(1, gpus)


class Sweep:
    """The runs of one folder."""

    def __init__(self, config: ReproduceConfig, out: Path, train: ShardSet, device: str, processes: int) -> None:
        """Nothing is written yet."""
        self._config, self._out, self._train, self._device = config, out, train, device
        self._processes, self._recipe_name = processes, choose_recipe(device, train)
        self._recipe = RECIPES[self._recipe_name]

    def settle_scale(self, table: PaperTable, val: ShardSet) -> Scale:
        """That of the sweep in this folder, or a new one. Raises UserError if it is another sweep's, or too little."""
        config, path = self._config, self._out / SCALE_FILE
        asked: dict[str, Any] = {
            **{"table": config.table, "data": self._train.fingerprint, "val_data": val.fingerprint},
            **{"budget": config.budget, "device": self._device, "seed": config.seed, "recipe": self._recipe_name},
        }
        if path.is_file():
            old = Scale(**_read_json(path))
            differing = [
                f"{name}: there {getattr(old, name)}, now {v}" for name, v in asked.items() if getattr(old, name) != v
            ]
            if differing:
                raise UserError(
                    f"--out {self._out} holds another sweep ({'; '.join(differing)}): give what it had to go on with "
                    "it, or another --out"
                )
            print(f"going on with the sweep in {self._out}: {old.epochs} epochs for each variant")
            return old
        samples = self._train.num_samples
        scale = Scale(**asked, epochs=fit_epochs(table, self._pilot(), self._recipe, samples, config.budget))
        _write(path, asdict(scale))
        return scale

    def _pilot(self) -> Pilot:
        """Measure, or read what a former call in this folder measured."""
        folder, path = self._out / "pilot", self._out / PILOT_FILE
        if path.is_file():
            return Pilot(**_read_json(path))
        shutil.rmtree(folder, ignore_errors=True)  # of a pilot that was stopped: its times would be wrong
        print(f"pilot: {PILOT_STEPS} steps of {self._recipe.name}, batch {self._recipe.batch}", flush=True)
        one_knn = ("--epochs", "1000", "--knn-every", "1000")
        flags = (*one_knn, "--max-steps", str(PILOT_STEPS), "--log-every", str(PILOT_LOG_EVERY))
        start = time.perf_counter()
        self._launch(PRETRAIN, [*self._pretrain_flags(folder), "--global-batch", str(self._recipe.batch), *flags])
        whole_s, start = time.perf_counter() - start, time.perf_counter()
        self._launch(LINEAR, self._linear_flags(folder))
        linear_s = time.perf_counter() - start
        lines = [line for line in read_lines(folder / METRICS_FILE) if "loss" in line]
        step_s = self._recipe.batch / statistics.median(line["img_per_s"] for line in lines[2:])
        session_s = _read_json(folder / SUMMARY_FILE)["session_s"]
        pilot = Pilot(step_s, whole_s - session_s, max(0.0, session_s - PILOT_STEPS * step_s), linear_s)
        _write(path, asdict(pilot))
        return pilot

    def run(self, variant: Variant, scale: Scale) -> None:
        """Pretrain and measure one variant, or what of it is not done yet."""
        folder = self._out / variant.name
        batch = variant.batch or self._recipe.batch
        total = scale.epochs * (self._train.num_samples // batch)
        flags = ["--epochs", str(scale.epochs), "--global-batch", str(batch), *variant.flags]
        flags += ["--knn-every", str(knn_every(scale.epochs)), "--log-every", str(max(1, total // 100))]
        if not _finished(folder):
            self._launch(PRETRAIN, [*self._pretrain_flags(folder), *flags])
        if not _finished(folder / "linear"):
            self._launch(LINEAR, self._linear_flags(folder))

    def _pretrain_flags(self, folder: Path) -> list[str]:
        config = self._config
        places = ["--data", str(config.data), "--knn-data", str(config.val_data), "--run-dir", str(folder)]
        keep = ["--checkpoint-every", "1m", "--keep-checkpoints", "1", "--resume"]
        return [*places, *keep, "--device", self._device, "--seed", str(config.seed), *self._recipe.pretrain]

    def _linear_flags(self, folder: Path) -> list[str]:
        config = self._config
        places = ["--data", str(config.data), "--val-data", str(config.val_data), "--checkpoint", str(folder)]
        more = ["--run-dir", str(folder / "linear"), "--resume", "--device", self._device]
        return [*places, *more, "--lr-sweep", LINEAR_RATES, *self._recipe.linear]

    def _launch(self, script: Path, arguments: list[str]) -> None:
        """Run a script on all processes. Ends the sweep with its exit code if it fails; it has said why itself."""
        launcher = [sys.executable]
        if self._processes > 1:
            several = f"--nproc-per-node={self._processes}"
            launcher += ["-m", "torch.distributed.run", "--standalone", several]
        print("$ " + shlex.join(["python", *launcher[1:], os.path.relpath(script), *arguments]), flush=True)
        child = subprocess.Popen([*launcher, str(script), *arguments])
        try:
            code = child.wait()
        except KeyboardInterrupt:
            child.send_signal(signal.SIGTERM)  # pretrain.py writes a checkpoint first
            child.wait()
            raise
        if code == EXIT_STOPPED:
            raise KeyboardInterrupt
        if code:
            print(f"the sweep ends here: the command above failed with exit code {code}", file=sys.stderr)
            sys.exit(code if code > 0 else 128 - code)  # a signal, as the shell reports it


def command_of(config: ReproduceConfig) -> str:
    """The command for people who want to repeat it."""
    given = [config.table, "--data", str(config.data), "--val-data", str(config.val_data)]
    more = ["--device", config.device] if config.device != "auto" else []
    return shlex.join(["python", "tools/reproduce.py", *given, "--budget", f"{config.budget:g}", *more])


def _finished(folder: Path) -> bool:
    return (folder / SUMMARY_FILE).is_file() and bool(_read_json(folder / SUMMARY_FILE)["finished"])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete it, and the same command makes it again") from error
    assert isinstance(value, dict)
    return value


def _write(path: Path, values: dict[str, Any]) -> None:
    with disk_errors(f"writing {path}", f"cannot write {path}", "name another --out"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, values)


def _interrupt(_: int, __: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    exit_on_user_error(main)
