"""The runs of a sweep: a pilot that measures the machine, then every variant with every seed, each once.

All state is in files (scale.json, pilot.json, the run folders), so the same command continues a stopped sweep.
"""

from __future__ import annotations

import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pipeline.common.errors import UserError, require
from pipeline.common.files import disk_errors, read_object, write_json
from pipeline.common.locations import InputPath, LocalPath
from pipeline.dataset.dataset import ShardSet
from tools.common.own_commands import after_python
from tools.reproduction.method_flags import method_flags
from tools.reproduction.paper_tables import PaperTable, Variant
from tools.reproduction.scale import (
    LINEAR_RATES,
    PILOT_STEPS,
    RECIPES,
    Pilot,
    Scale,
    choose_recipe,
    fit_epochs,
    knn_every,
)
from train.storage.run_folder import METRICS_FILE, SUMMARY_FILE, read_lines

PRETRAIN, LINEAR = "python train/pretrain.py", "python train/linear.py"
SCALE_FILE, PILOT_FILE = "scale.json", "pilot.json"
PILOT_LOG_EVERY = 4  # steps; the first lines are left out, as everything warms up
EXIT_STOPPED = 75  # as train/pretrain.py: the same command continues


@dataclass(frozen=True)
class ReproduceConfig:
    """Flags of reproduce.py."""

    table: Annotated[str, tyro.conf.Positional]
    """Experiment to repeat: stop-gradient, predictor, batch-size, bn, similarity, symmetrisation, alternation,
    moving-average, output-dimension or methods (SimSiam beside SimCLR, MoCo v2, BYOL, SwAV and DINO)."""
    data: InputPath
    """Labelled dataset to train on."""
    val_data: InputPath
    """Labelled dataset for validation, of the same classes."""
    budget: float
    """Minutes for the whole sweep."""
    seeds: int = 1
    """Run every variant with so many seeds: the page then has means and intervals, in the same budget."""
    out: LocalPath | None = None
    """Folder of the runs (default: runs/reproduce/TABLE). A sweep in it is continued."""
    docs: LocalPath | None = None
    """Folder for TABLE.md and TABLE.png (default: that of the runs)."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device of every run; auto: all GPUs, or the CPU if there are none."""
    processes: int = 0
    """Processes of each run; 0: one for each GPU, or one."""
    seed: int = 0
    """First seed of weights, order and views; further seeds count up from it."""

    def __post_init__(self) -> None:
        require("--budget", f"{self.budget:g}", self.budget > 0, "give the minutes that the sweep may take")
        require("--seeds", self.seeds, self.seeds >= 1, "it must be at least 1")
        require("--processes", self.processes, self.processes >= 0, "it must be at least 1, or 0 for one a GPU")


class Sweep:
    """The runs of one sweep, in the folder ``out``."""

    def __init__(self, config: ReproduceConfig, out: Path, train: ShardSet, device: str, processes: int) -> None:
        self._config, self._out, self._train, self._device = config, out, train, device
        self._processes, self._recipe_name = processes, choose_recipe(device, train)
        self._recipe = RECIPES[self._recipe_name]

    def settle_scale(self, table: PaperTable, val: ShardSet) -> Scale:
        """The scale of the sweep in this folder, or a new one. Raises UserError for another sweep or a small budget."""
        config, path = self._config, self._out / SCALE_FILE
        asked: dict[str, Any] = {
            **{"table": config.table, "data": self._train.fingerprint, "val_data": val.fingerprint},
            **{"budget": config.budget, "device": self._device, "seed": config.seed, "recipe": self._recipe_name},
            "seeds": config.seeds,
        }
        if path.is_file():
            old = Scale(**_read_json(path))
            differing = [
                f"{name}: there {getattr(old, name)}, now {v}" for name, v in asked.items() if getattr(old, name) != v
            ]
            if differing:
                raise UserError(
                    f"--out {self._out} holds another sweep ({'; '.join(differing)}): repeat its settings to continue "
                    "it, or name another --out"
                )
            print(f"going on with the sweep in {self._out}: {old.epochs} epochs for each variant")
            return old
        samples = self._train.num_samples
        epochs = fit_epochs(table, self._pilot(), self._recipe, samples, config.budget, config.seeds)
        scale = Scale(**asked, epochs=epochs)
        _write(path, asdict(scale))
        return scale

    def _pilot(self) -> Pilot:
        """Measure, or read what an earlier call in this folder measured."""
        folder, path = self._out / "pilot", self._out / PILOT_FILE
        if path.is_file():
            return Pilot(**_read_json(path))
        shutil.rmtree(folder, ignore_errors=True)  # of a pilot that was stopped: its times would be wrong
        print(f"pilot: {PILOT_STEPS} steps of {self._recipe.name}, batch {self._recipe.batch}", flush=True)
        one_knn = ("--epochs", "1000", "--knn-every", "1000")
        flags = (*one_knn, "--max-steps", str(PILOT_STEPS), "--log-every", str(PILOT_LOG_EVERY))
        start = time.perf_counter()
        self._launch(
            PRETRAIN,
            [
                *self._pretrain_flags(folder, self._config.seed),
                *self._recipe.pretrain,
                "--global-batch",
                str(self._recipe.batch),
                *flags,
            ],
        )
        whole_s, start = time.perf_counter() - start, time.perf_counter()
        self._launch(LINEAR, self._linear_flags(folder))
        linear_s = time.perf_counter() - start
        lines = [line for line in read_lines(folder / METRICS_FILE) if "loss" in line]
        step_s = self._recipe.batch / statistics.median(line["img_per_s"] for line in lines[2:])
        session_s = _read_json(folder / SUMMARY_FILE)["session_s"]
        pilot = Pilot(step_s, whole_s - session_s, max(0.0, session_s - PILOT_STEPS * step_s), linear_s)
        _write(path, asdict(pilot))
        return pilot

    def folders(self, variant: Variant) -> list[Path]:
        """The variant's run folders, one for each seed."""
        more = [self._out / f"{variant.name}-seed-{number}" for number in range(1, self._config.seeds)]
        return [self._out / variant.name, *more]

    def run(self, variant: Variant, scale: Scale) -> None:
        """Pretrain and measure one variant with every seed; finished runs are skipped."""
        for number, folder in enumerate(self.folders(variant)):
            self._run_once(variant, scale, folder, scale.seed + number)

    def _run_once(self, variant: Variant, scale: Scale, folder: Path, seed: int) -> None:
        batch = variant.batch or self._recipe.batch
        total = scale.epochs * (self._train.num_samples // batch)
        flags = ["--epochs", str(scale.epochs), "--global-batch", str(batch), *variant.flags]
        flags += ["--knn-every", str(knn_every(scale.epochs)), "--log-every", str(max(1, total // 100))]
        if not _finished(folder):
            shared = self._recipe.pretrain
            if variant.method is not None:
                shared = method_flags(variant.method, self._recipe_name, scale.epochs)
            self._launch(PRETRAIN, [*self._pretrain_flags(folder, seed), *shared, *flags])
        if not _finished(folder / "linear"):
            self._launch(LINEAR, self._linear_flags(folder))

    def _pretrain_flags(self, folder: Path, seed: int) -> list[str]:
        config = self._config
        places = ["--data", str(config.data), "--knn-data", str(config.val_data), "--run-dir", str(folder)]
        keep = ["--checkpoint-every", "1m", "--keep-checkpoints", "1", "--resume"]
        return [*places, *keep, "--device", self._device, "--seed", str(seed)]

    def _linear_flags(self, folder: Path) -> list[str]:
        config = self._config
        places = ["--data", str(config.data), "--val-data", str(config.val_data), "--checkpoint", str(folder)]
        more = ["--run-dir", str(folder / "linear"), "--resume", "--device", self._device]
        return [*places, *more, "--lr-sweep", LINEAR_RATES, *self._recipe.linear]

    def _launch(self, command: str, arguments: list[str]) -> None:
        """Run a command on all processes. If it fails, its message stands, and the sweep exits with its code."""
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self._processes}"]
        words = [*(several if self._processes > 1 else []), *after_python(command), *arguments]
        print(f"$ {shlex.join(['python', *words])}", flush=True)
        child = subprocess.Popen([sys.executable, *words])
        try:
            code = child.wait()
        except KeyboardInterrupt:
            child.send_signal(signal.SIGTERM)  # pretrain.py writes a checkpoint first
            child.wait()
            raise
        if code == EXIT_STOPPED:
            raise KeyboardInterrupt
        if code:
            print(f"the sweep stops: the command above failed with exit code {code}", file=sys.stderr)
            sys.exit(code if code > 0 else 128 - code)  # a signal, as the shell reports it


def _finished(folder: Path) -> bool:
    return (folder / SUMMARY_FILE).is_file() and bool(_read_json(folder / SUMMARY_FILE)["finished"])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete it, and the same command makes it again") from error


def _write(path: Path, values: dict[str, Any]) -> None:
    with disk_errors(f"writing {path}", f"cannot write {path}", "name another --out"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, values)
