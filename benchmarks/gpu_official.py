"""The GPU suite's yardstick: the official recipe (PIL, float32, contiguous, unfused) on the same GPU."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_bench import Suite, number_format
from gpu_roofline import step_limits
from gpu_steps import make_contiguous, with_plain_sgd
from loader_vs_official import official_loader, write_folder

from pipeline.common.system import share_of_cores
from pipeline.loader.loader import ViewBatch
from pipeline.sampling.views import ViewRecipe
from tools.throughput.report import StageResult
from tools.throughput.stages import Advance
from tools.throughput.timing import StageRunner, Trial
from train.engine.loop import train_step
from train.engine.run import Run

OFFICIAL_IMAGES = 1000


def official(suite: Suite) -> None:
    """The yardstick: the official recipe with PIL, float32, contiguous, unfused SGD, as many workers as cores."""
    suite.attempt("official, end to end", lambda: _measure_official(suite))


def _measure_official(suite: Suite) -> dict[str, Any]:
    batch = suite.size.batches[0]
    bench, run = suite.set_up(batch, precision="fp32", optimizer="foreach")
    run = with_plain_sgd(run, foreach=None)
    make_contiguous(run)
    run.model.train()
    folder = Path(tempfile.mkdtemp(prefix="official-"))
    try:
        _fill_folder(suite, batch, folder)
        with number_format("fp32"), _official_steps(suite, run, folder, batch) as advance:
            advance(2)  # workers start, algorithms are chosen
            runner = StageRunner(suite.size.trial_s, suite.watch, bench.tidy)
            count = max(4, round(16 * 1024 / batch / 4)) if suite.size.device == "cuda" else 2
            trials: list[Trial] = []
            for _ in range(suite.size.repeats):
                trials.append(runner.timed(advance, batch, count))
                suite.note("official, end to end", _official_result(trials, batch))
    finally:
        shutil.rmtree(folder)
    limits = step_limits(suite, run, bench.resident_views())
    return {**_official_result(trials, batch), "roofline": limits}


def _official_result(trials: list[Trial], batch: int) -> dict[str, Any]:
    return {**asdict(StageResult.of(trials)), "batch": batch, "workers": share_of_cores(1)}


def _fill_folder(suite: Suite, batch: int, folder: Path) -> None:
    """Some images, linked to under many names: an epoch must keep all workers busy for long."""
    images = min(OFFICIAL_IMAGES, suite.dataset.num_samples)
    write_folder(suite.dataset, images, folder)
    files = sorted((folder / "class").iterdir())
    for number in range(images, suite.size.epoch_batches * batch):
        os.link(files[number % images], folder / "class" / f"{number:06d}.jpg")


@contextmanager
def _official_steps(suite: Suite, run: Run, folder: Path, batch: int) -> Iterator[Advance]:
    workers = share_of_cores(1)
    loader = official_loader(folder, ViewRecipe(image_size=suite.size.image_size), batch, workers)
    device = suite.dist.device
    loader.pin_memory = device.type == "cuda"  # as the official script asks for

    def views() -> Iterator[ViewBatch]:
        while True:
            for (x1, x2), _ in loader:
                on_device = [x.to(device, non_blocking=True) for x in (x1, x2)]
                yield ViewBatch(on_device, np.zeros(batch, np.int64), np.zeros(batch, np.int64), 0, 0)

    batches = views()

    def advance(count: int) -> dict[str, float]:
        for _ in range(count):
            train_step(run, batches)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        return {}

    try:
        yield advance
    finally:
        batches.close()
