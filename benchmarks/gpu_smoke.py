"""A minute's look at a machine new to us: does each piece run at all? Every check is tried, whatever the others say.

    python benchmarks/gpu_smoke.py DATASET            (a GPU)
    python benchmarks/gpu_smoke.py DATASET --toy      (a CPU)

One batch through DALI by each decoder against torchvision's crops, the photometric stage against the CPU's, the loader
with its threads and streams, a training step, one that would wait for the GPU in secret, one with a nan in it.
Exit code 1 if a check failed.
"""

from __future__ import annotations

import train.openmp  # noqa: F401  # before torch

# isort: split
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import torch
import tyro
from gpu_bench import toy_or_real
from gpu_images import decoders

from model.methods.simsiam import SimSiamConfig
from pipeline.backends import reference
from pipeline.backends.base import Batch, DaliConfig
from pipeline.backends.photometric import Photometric
from pipeline.common.errors import exit_on_user_error
from pipeline.common.locations import InputPath
from pipeline.dataset.dataset import ShardSet
from pipeline.sampling.views import ViewRecipe, draw_views
from tools.common.measuring import describe_machine
from tools.throughput.stages import Bench
from tools.throughput.workload import ProfileConfig, build
from train.distributed.process_group import DistContext, distributed
from train.engine.loop import train_step
from train.engine.run import Run

IMAGES = 16
BATCH = 32
CLOSE = 2.0  # of 255, in the mean: what is only another rounding lies far below, what is wrong far above


@dataclass(frozen=True)
class Config:
    """The checks."""

    data: Annotated[InputPath, tyro.conf.Positional]
    """Dataset folder."""
    toy: bool = False
    """The same on a CPU."""
    first: bool = False
    """The photometric stage alone: the first launch of Triton, and the code that the other checks wait for."""


class Smoke:
    """The checks of one device."""

    def __init__(self, dataset: ShardSet, dist: DistContext, model: SimSiamConfig, image_size: int) -> None:
        """``model`` takes the training steps, on views of ``image_size`` px."""
        self._dataset, self._dist, self._model = dataset, dist, model
        self._recipe = ViewRecipe(image_size=image_size)
        self.failed: list[str] = []

    def attempt(self, name: str, check: Callable[[], str]) -> None:
        start_s = time.perf_counter()
        try:
            said = check()
        except Exception as error:  # noqa: BLE001  told, and the command exits with code 1
            traceback.print_exc()
            self.failed.append(name)
            said = f"FAILED: {type(error).__name__}: {error}"
        print(f"{name}: {said} ({time.perf_counter() - start_s:.1f} s)", flush=True)

    def batch(self) -> Batch:
        ids = np.arange(min(IMAGES, self._dataset.num_samples), dtype=np.int64)
        encoded = [np.frombuffer(self._dataset.read(int(sample)), dtype=np.uint8) for sample in ids]
        params = draw_views(self._recipe, 0, 0, ids, self._dataset.sizes(ids))
        return Batch(0, 0, ids, ids, encoded, params)

    def squares(self, decoder: DaliConfig) -> str:
        """DALI against PIL and torchvision."""
        from pipeline.backends.dali_backend import DaliSquares

        batch, side = self.batch(), self._recipe.image_size
        _, made = next(DaliSquares(iter([batch]), self._recipe, len(batch), 2, self._dist.device, decoder))
        apart = []
        for sample, encoded in enumerate(batch.encoded):
            image = reference.decode(encoded.tobytes())
            for view, squares in enumerate(made):
                crop = reference.resized_crop(image, batch.windows, sample, view, side)  # type: ignore[arg-type]
                apart.append((squares[sample].cpu().permute(2, 0, 1).float() - crop.float()).abs())
        return _judged(torch.stack(apart))

    def photometric(self) -> str:
        """The device's stage against the CPU's, on the same squares."""
        from concurrent.futures import ThreadPoolExecutor

        batch, side = self.batch(), self._recipe.image_size
        generator = torch.Generator().manual_seed(0)
        squares = torch.randint(0, 256, (len(batch), side, side, 3), dtype=torch.uint8, generator=generator)
        std = torch.tensor(self._recipe.std)[:, None, None]
        with ThreadPoolExecutor(1) as pool:
            views = [
                Photometric(self._recipe, device, torch.float32, pool, 1)([squares.to(device)] * 2, batch.windows)
                for device in (self._dist.device, torch.device("cpu"))
            ]
        return _judged(torch.stack([(a.cpu() - b).abs() * std * 255 for a, b in zip(*views, strict=True)]))

    def set_up(self) -> tuple[Bench, Run]:
        config = ProfileConfig(
            data=str(self._dataset.path),
            batch=min(BATCH, self._dataset.num_samples),
            device="cuda" if self._dist.device.type == "cuda" else "cpu",
            model=self._model,
            views=self._recipe,
        )
        return build(config, self._dataset, self._dist)

    def steps(self) -> str:
        """Steps fed by the loader."""
        bench, run = self.set_up()
        with bench.views() as batches:
            losses = [train_step(run, batches).loss.item() for _ in range(3)]
        assert all(np.isfinite(losses)), losses
        return f"losses {', '.join(f'{loss:.4f}' for loss in losses)}"

    def waits(self) -> str:
        """A step in which whatever waits for the GPU is an error."""
        bench, run = self.set_up()
        views = bench.resident_views()
        train_step(run, iter(views))
        if self._dist.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            train_step(run, iter(views))
        finally:
            if self._dist.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        return "nothing waits"

    def bad_step(self) -> str:
        """A step with a nan changes no weight."""
        bench, run = self.set_up()
        views = bench.resident_views()
        train_step(run, iter(views))
        before = [weight.detach().clone() for weight in run.model.parameters()]
        spoilt = views[0].x1.clone()
        spoilt[0, 0, 0, 0] = float("nan")
        train_step(run, iter([replace(views[0], views=[spoilt, views[0].x2])]))
        assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
        assert int(run.guard.skipped) == 1
        return "skipped"


def _judged(apart: torch.Tensor) -> str:
    mean, most = apart.mean().item(), apart.max().item()
    assert mean <= CLOSE, f"mean {mean:.3f} of 255"
    return f"mean {mean:.3f}, max {most:.0f} of 255"


def main() -> None:
    """The command."""
    config = tyro.cli(Config, description=__doc__)
    size = toy_or_real(config.toy)
    with distributed(size.device) as dist:
        print(describe_machine(), flush=True)
        smoke = Smoke(ShardSet.open(config.data), dist, size.model, size.image_size)
        smoke.attempt("photometric stage", smoke.photometric)
        if not config.first:
            for name, decoder in decoders().items() if dist.device.type == "cuda" else [("CPU", DaliConfig())]:
                smoke.attempt(f"DALI, {name}", lambda decoder=decoder: smoke.squares(decoder))  # type: ignore[misc]
            smoke.attempt("training steps", smoke.steps)
            smoke.attempt("a step without a wait", smoke.waits)
            smoke.attempt("a step with a nan", smoke.bad_step)
    if smoke.failed:
        print(f"failed: {', '.join(smoke.failed)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    exit_on_user_error(main)
