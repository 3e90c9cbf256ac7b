"""Owns where the loss takes its targets from: the encoder, a frozen copy of it, or an average kept for every image.

Chen & He 2020, section 5: SimSiam as an alternation between the weights theta and the targets eta. As it is, every step
has targets of its own; the two other kinds are the experiments of section 5.2. Here and not in model/, because they
remember, and so have files and must agree between the ranks.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from typing_extensions import assert_never

from model.methods.simsiam import SimSiam, SimSiamConfig, SimSiamOutput
from pipeline.common.errors import UserError
from pipeline.common.files import atomic_file, disk_errors
from pipeline.dataset.format import file_sha256
from pipeline.loader.loader import ViewBatch
from train.distributed.collectives import gather_rows
from train.distributed.process_group import DistContext
from train.storage.checkpoints import host_copy


@runtime_checkable  # so that tests can check annotations
class Targets(Protocol):
    """Puts the targets of a pass in the place of z1 and z2."""

    def __call__(self, step: int, out: SimSiamOutput, views: ViewBatch) -> SimSiamOutput:
        """``out`` with targets; ``step`` counts from 0, and the weights are those before it. Perhaps a collective."""

    def allocate(self, run_dir: Path) -> None:
        """Take what it needs of memory or disk. Raises UserError if there is not enough."""

    def save(self, folder: Path, step: int) -> Callable[[], dict[str, Any]]:
        """Copy what the next step would change; the result writes large things beside the checkpoint in ``folder``.

        It returns what the checkpoint must hold, and may be called in a thread, while training goes on. On rank 0
        alone.
        """

    def load(self, state: dict[str, Any], folder: Path) -> None:
        """Take up what ``save`` gave, after ``allocate``. Raises UserError if its file is missing or damaged."""


def make_targets(model: SimSiam, steps_per_epoch: int, num_samples: int, dist: DistContext) -> Targets:
    """The kind of targets that ``model.config`` asks for; ``model`` is complete and on its device."""
    config = model.config
    match config.targets:
        case "encoder":
            return EncoderTargets()
        case "frozen":
            return FrozenTargets(model, steps_per_epoch if config.target_steps == "epoch" else config.target_steps)
        case "moving-average":
            return AveragedTargets(config, num_samples, dist)
        case unreachable:
            assert_never(unreachable)


class EncoderTargets:
    """The other view's projection in the same pass: algorithm 1."""

    def __call__(self, step: int, out: SimSiamOutput, views: ViewBatch) -> SimSiamOutput:
        """``out`` as it is."""
        return out

    def allocate(self, run_dir: Path) -> None:
        """Nothing."""

    def save(self, folder: Path, step: int) -> Callable[[], dict[str, Any]]:
        """Nothing."""
        return dict

    def load(self, state: dict[str, Any], folder: Path) -> None:
        """Nothing."""


class FrozenTargets:
    """The projections of an encoder that is a copy of the trained one, renewed every k steps: "multi-step alternation".

    The paper computes the targets of the next k steps at once and keeps them; to compute each when its step comes gives
    the same numbers. The copy takes batch statistics of its own, as the encoder does, so that k = 1 is SimSiam as it
    is, to the bit.
    """

    def __init__(self, model: SimSiam, steps: int) -> None:
        """``steps`` is k. ``model`` may be trained further: the copy does not follow."""
        self._trained = torch.nn.Sequential(model.backbone, model.projector)
        self._frozen = copy.deepcopy(self._trained).requires_grad_(False).train()
        self._steps, self._renewed_at = steps, -1

    @torch.no_grad()
    def __call__(self, step: int, out: SimSiamOutput, views: ViewBatch) -> SimSiamOutput:
        """Two more passes forward, through the copy."""
        if step % self._steps == 0 and step != self._renewed_at:
            self._frozen.load_state_dict(self._trained.state_dict())
            self._renewed_at = step
        return out._replace(z1=self._frozen(views.x1), z2=self._frozen(views.x2))

    def allocate(self, run_dir: Path) -> None:
        """Nothing."""

    def save(self, folder: Path, step: int) -> Callable[[], dict[str, Any]]:
        """The copy's weights and the step before which it was made."""
        return host_copy({"frozen": self._frozen.state_dict(), "renewed_at": self._renewed_at})

    def load(self, state: dict[str, Any], folder: Path) -> None:
        """Take them up."""
        self._frozen.load_state_dict(state["frozen"])
        self._renewed_at = state["renewed_at"]


class AveragedTargets:
    """A moving average of each image's projections over its epochs: "expectation over augmentations".

    ``eta_x <- m eta_x + (1 - m) F(T'(x))``, and the other view is drawn to it, with no predictor between. Where the
    loss is symmetric, each view has a target that its own projection is not part of, and eta becomes the mean of both.
    A row of zeros has no past yet: its first target is F(T'(x)) itself. A projection that is not finite is not
    remembered.

    Every rank keeps all rows, num_samples x dim x 4 bytes, since an image comes to another rank in each epoch; what
    changed in a pass is gathered, 4 MiB at a batch of 512 and dim 2048.
    """

    def __init__(self, config: SimSiamConfig, num_samples: int, dist: DistContext) -> None:
        """Takes no memory yet: ``allocate`` does."""
        self._momentum, self._symmetric, self._where = config.target_momentum, config.symmetric, config.target_memory
        self._shape, self._dist = (num_samples, config.dim), dist
        self._rows: Float32[np.ndarray, "samples d"] | None = None

    @torch.no_grad()
    def __call__(self, step: int, out: SimSiamOutput, views: ViewBatch) -> SimSiamOutput:
        """A host sync on a GPU, as the rows lie in the host's memory or on its disk."""
        assert self._rows is not None
        past = torch.from_numpy(self._rows[views.ids]).to(out.z1.device)
        momentum = self._momentum * past.ne(0).any(dim=1, keepdim=True)
        target1, target2 = (momentum * past + (1 - momentum) * z.detach().float() for z in (out.z1, out.z2))
        eta = (target1 + target2) / 2 if self._symmetric else target2
        self._write(views.ids, torch.where(eta.isfinite().all(dim=1, keepdim=True), eta, past))
        return out._replace(z1=target1, z2=target2)

    def _write(self, ids: Int64[np.ndarray, " n"], eta: Float[Tensor, "n d"]) -> None:
        assert self._rows is not None
        counts = [len(ids)] * self._dist.world_size
        all_ids = gather_rows(self._dist, torch.from_numpy(ids).to(eta.device), counts)
        self._rows[all_ids.cpu().numpy()] = gather_rows(self._dist, eta, counts).cpu().numpy()

    def allocate(self, run_dir: Path) -> None:
        """In memory, or in RUN_DIR/targets-rankR.npy, whose whole size is reserved now and not when it is half full."""
        if self._rows is not None:
            return
        if self._where == "ram":
            self._rows = np.zeros(self._shape, np.float32)
            return
        path = run_dir / f"targets-rank{self._dist.rank}.npy"
        with disk_errors(
            f"making {path}", f"{path} cannot be made", "name another --run-dir, or take --target-memory ram"
        ):
            run_dir.mkdir(parents=True, exist_ok=True)
            self._rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=self._shape)
            if hasattr(os, "posix_fallocate"):
                with open(path, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)

    def save(self, folder: Path, step: int) -> Callable[[], dict[str, Any]]:
        """All rows as a file beside the checkpoints, named and described in this one; files of deleted ones go.

        Rows in memory are copied, and written later; rows on disk are there because memory is short, and are written
        at once.
        """
        assert self._rows is not None
        if self._where == "ram":
            rows = self._rows.copy()
            return lambda: self._write_file(rows, folder, step)
        written = self._write_file(self._rows, folder, step)
        return lambda: written

    def _write_file(self, rows: Float32[np.ndarray, "samples d"], folder: Path, step: int) -> dict[str, Any]:
        path = folder / f"targets-{step:09d}.npy"
        with disk_errors(f"writing {path}"):
            folder.mkdir(parents=True, exist_ok=True)
            _delete_unused(folder)
            with atomic_file(path) as file:
                np.save(file, rows)
        return {"file": path.name, "sha256": file_sha256(path)}

    def load(self, state: dict[str, Any], folder: Path) -> None:
        """Read the rows of a checkpoint."""
        assert self._rows is not None
        path = folder / state["file"]
        if not path.is_file() or file_sha256(path) != state["sha256"]:
            raise UserError(
                f"{path}, the targets that belong to the newest checkpoint, is missing or damaged: restore it from a "
                "backup, delete the newest checkpoint to go on from the one before, or start again with another "
                "--run-dir"
            )
        self._rows[:] = np.load(path, mmap_mode="r")


def _delete_unused(folder: Path) -> None:
    """Delete the targets whose checkpoint is gone."""
    for path in folder.glob("targets-*.npy"):
        step = re.fullmatch(r"targets-(\d+)\.npy", path.name)
        if step is not None and not list(folder.glob(f"step-{step[1]}-*")):
            path.unlink()
