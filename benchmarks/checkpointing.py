"""The cost of a checkpoint for the training loop: python benchmarks/checkpointing.py [--folder DIR]

Three stretches of the same training steps in turn: undisturbed, with a checkpoint written before the first step
(foreground), and with one handed to the trainer's writer thread (background). Reported: the time that the loop lost,
which is that of the stretch less that of the undisturbed one; the time of the copy, for which the loop waits; and the
time of a write. Steps are forward, backward and SGD on one random batch; no data is loaded.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from model.methods.simsiam import SimSiam, SimSiamConfig, simsiam_loss
from pipeline.common.errors import exit_on_user_error
from pipeline.common.locations import LocalPath
from tools.common.measuring import Run, Spread, alternate, describe_machine, write_results
from train.storage.checkpoints import CheckpointWriter, host_copy, save_checkpoint


@dataclass(frozen=True)
class Config:
    """Flags of checkpointing.py."""

    backbone: str = "resnet50"
    """Backbone; a checkpoint holds it with projector, predictor and momentum."""
    image_size: int = 64
    """Side of the views, px."""
    batch: int = 8
    """Images a step."""
    sleep_ms: float = 0.0
    """Replace each step by a sleep of so many ms: as on a host whose GPU does the work (default: train)."""
    stretch_s: float = 20.0
    """Length of an undisturbed stretch of steps, s; longer than a write."""
    repeats: int = 5
    """Stretches of each kind after a warm-up."""
    folder: LocalPath | None = None
    """Folder for the checkpoints (default: the system's temporary folder)."""
    json: LocalPath | None = None
    """Write the results to this JSON file."""


class Bench:
    """A model in training, and its checkpoints."""

    def __init__(self, config: Config, folder: Path) -> None:
        self._folder, self._saves, self._sleep_s = folder, 0, 0.0
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._device, self._model = device, SimSiam(SimSiamConfig(backbone=config.backbone)).to(device)
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=0.05, momentum=0.9)
        self._views = [torch.randn(config.batch, 3, config.image_size, config.image_size, device=device) for _ in "12"]
        self.copy_s: list[float] = []
        self.write_s: list[float] = []
        self.steps(1)  # gives every weight its momentum
        self._sleep_s = config.sleep_ms / 1e3
        start = time.perf_counter()
        self.steps(2)
        self.count = max(1, round(2 * config.stretch_s / (time.perf_counter() - start)))

    def steps(self, count: int) -> None:
        """Train ``count`` steps and wait for the device."""
        for _ in range(count):
            if self._sleep_s > 0:
                time.sleep(self._sleep_s)
                continue
            self._optimizer.zero_grad()
            simsiam_loss(*self._model(*self._views)).backward()
            self._optimizer.step()
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _state(self) -> dict[str, Any]:
        return {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict()["state"]}

    def _save(self, state: Callable[[], dict[str, Any]]) -> Path:
        self._saves += 1
        start = time.perf_counter()
        path = save_checkpoint(self._folder, state(), self._saves, keep=1)
        self.write_s.append(time.perf_counter() - start)
        return path

    def undisturbed(self) -> None:
        self.steps(self.count)

    def foreground(self) -> None:
        self._save(self._state)
        self.steps(self.count)

    def background(self) -> None:
        """Steps while a checkpoint is written; waits at the end for a write that lasts longer."""
        with CheckpointWriter() as writer:
            start = time.perf_counter()
            state = host_copy(self._state())
            writer.start(lambda: self._save(state))
            self.copy_s.append(time.perf_counter() - start)
            self.steps(self.count)
            writer.wait()


def lost(runs: Mapping[str, list[Run]], kind: str) -> Spread:
    """Seconds that a checkpoint cost the loop, round by round."""
    pairs = zip(runs[kind], runs["undisturbed"], strict=True)
    return Spread.of([run.wall_s - undisturbed.wall_s for run, undisturbed in pairs])


def main() -> None:
    """The command."""
    config = tyro.cli(Config, description=__doc__)
    print(describe_machine(), flush=True)
    with tempfile.TemporaryDirectory(prefix="checkpointing-", dir=config.folder) as folder:
        bench = Bench(config, Path(folder))
        contestants = {
            "undisturbed": bench.undisturbed,
            "foreground": bench.foreground,
            "background": bench.background,
        }
        runs = alternate(contestants, config.repeats)
        (checkpoint,) = Path(folder).iterdir()
        size_mb = checkpoint.stat().st_size / 1e6
    stretch = Spread.of([run.wall_s for run in runs["undisturbed"]])
    results = {
        "foreground_lost_s": lost(runs, "foreground"),
        "background_lost_s": lost(runs, "background"),
        "background_copy_s": Spread.of(bench.copy_s[1:]),
        "write_s": Spread.of(bench.write_s[1:]),
    }
    print(f"{config.backbone}: {size_mb:.0f} MB a checkpoint; {bench.count} steps in {stretch} s undisturbed")
    print(f"{config.repeats} stretches of each kind in turn; median (minimum .. maximum)")
    for name, spread in results.items():
        print(f"{name:20} {spread}")
    if config.json:
        write_results(config.json, {"checkpoint_mb": size_mb, "steps": bench.count, "stretch_s": stretch, **results})


if __name__ == "__main__":
    exit_on_user_error(main)
