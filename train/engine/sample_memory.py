"""SampleMemory: a row of numbers for every image, which a method reads and replaces when it sees the image.

For SimSiam's moving averages (Chen & He 2020, section 5.2). Each rank keeps all rows, num_samples x dim x 4 bytes, in
memory or on disk, as an image comes to another rank in each epoch; the rows that change in a pass are gathered.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from pipeline.common.errors import UserError
from pipeline.common.files import atomic_file, disk_errors, map_array
from pipeline.dataset.format import file_sha256
from train.distributed.collectives import gather_rows
from train.distributed.process_group import DistContext


class SampleMemory:
    """Rows of zeros at first. They are copied to the host, so that each pass waits for a GPU."""

    def __init__(self, num_samples: int, dim: int, where: Literal["ram", "disk"], dist: DistContext) -> None:
        self._shape, self._where, self._dist = (num_samples, dim), where, dist
        self._rows: Float32[np.ndarray, "samples d"] | None = None

    def read(self, ids: Int64[np.ndarray, " n"]) -> Float[Tensor, "n d"]:
        """The rows of samples ``ids``, on the device."""
        assert self._rows is not None
        return torch.from_numpy(self._rows[ids]).to(self._dist.device)

    def write(self, ids: Int64[np.ndarray, " n"], rows: Float[Tensor, "n d"]) -> None:
        """Replace the rows of samples ``ids``, of all ranks on every rank. A collective and, on a GPU, a host sync."""
        assert self._rows is not None
        counts = [len(ids)] * self._dist.world_size
        all_ids = gather_rows(self._dist, torch.from_numpy(ids).to(rows.device), counts)
        self._rows[all_ids.cpu().numpy()] = gather_rows(self._dist, rows, counts).cpu().numpy()

    def allocate(self, run_dir: Path) -> None:
        """Take the memory, or RUN_DIR/targets-rankR.npy, whose whole size is reserved now.

        Raises UserError if there is no room.
        """
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
            path.unlink(missing_ok=True)  # it may be a link
            self._rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=self._shape)
            if hasattr(os, "posix_fallocate"):
                with open(path, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)

    def save(self, folder: Path, step: int) -> Callable[[], dict[str, Any]]:
        """Copy what the next step would change; the function returned writes the rows beside the checkpoint.

        It returns the entry of the checkpoint, and may run in a thread while training goes on. Rows on disk are there
        because memory is short: they are written at once. On rank 0 alone.
        """
        assert self._rows is not None
        if self._where == "ram":
            rows = self._rows.copy()
            return lambda: self._write_file(rows, folder, step)
        entry = self._write_file(self._rows, folder, step)
        return lambda: entry

    def _write_file(self, rows: Float32[np.ndarray, "samples d"], folder: Path, step: int) -> dict[str, Any]:
        path = folder / f"targets-{step:09d}.npy"
        with disk_errors(f"writing {path}"):
            folder.mkdir(parents=True, exist_ok=True)
            _delete_unused(folder)
            with atomic_file(path) as file:
                np.save(file, rows)
        return {"file": path.name, "sha256": file_sha256(path)}

    def load(self, entry: dict[str, Any], folder: Path) -> None:
        """Read the rows of a checkpoint in ``folder``, after ``allocate``. Raises UserError if they are damaged."""
        assert self._rows is not None
        path = folder / Path(entry["file"]).name
        restore = (
            "restore it from a backup, delete the newest checkpoint to go on from the one before, or start again with "
            "another --run-dir"
        )
        if not path.is_file() or file_sha256(path) != entry["sha256"]:
            raise UserError(
                f"{path}, the targets that belong to the newest checkpoint, is missing or damaged: {restore}"
            )
        try:
            self._rows[:] = map_array(path)
        except ValueError as error:
            raise UserError(f"{path} does not fit this run: {error}; {restore}") from error


def _delete_unused(folder: Path) -> None:
    for path in folder.glob("targets-*.npy"):
        step = re.fullmatch(r"targets-(\d+)\.npy", path.name)
        if step is not None and not list(folder.glob(f"step-{step[1]}-*")):
            path.unlink()
