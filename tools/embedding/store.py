"""A folder of embeddings: one row a sample, in the dataset's order, written block by block.

A block is BLOCK consecutive samples. It is computed by one rank, in the same passes on any number of ranks, and is
marked as done only when it is on the disk. So an interrupted job goes on with the blocks that are missing, and memory
is that of one block whatever the number of samples. _embeddings.json comes last: a folder without it is not complete.

    _embeddings.json           what was embedded with what, the format, the samples that could not be read
    embeddings.npy             --format npy: [n, d]; names.txt beside it: the name of row i in line i
    embeddings-000000.parquet  --format parquet: columns id, name, label, vector
    embeddings-000000.tar      --format webdataset: KEY.npy, KEY.json
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import webdataset
from jaxtyping import Float, Int64
from typing_extensions import assert_never

from pipeline.common.errors import UserError
from pipeline.common.files import (
    atomic_file,
    disk_errors,
    map_array,
    open_regular,
    read_object,
    read_regular,
    write_json,
)
from pipeline.common.text import printable
from pipeline.dataset.format import PARTIAL_DIR
from pipeline.dataset.out_folder import LocalOut, Lock

RECORD, MATRIX, NAMES, UNFINISHED = "_embeddings.json", "embeddings.npy", "names.txt", PARTIAL_DIR
PLAN = "plan.json"  # in it: what the job makes
BLOCK = 1 << 14  # samples; a multiple of the images of a pass, so that passes are the same whoever computes a block

Format = Literal["npy", "parquet", "webdataset"]


@dataclass(frozen=True)
class Block:
    """The embeddings of consecutive samples."""

    number: int
    ids: Int64[np.ndarray, " n"]
    names: list[str]
    labels: Int64[np.ndarray, " n"]  # -1: none
    vectors: Float[np.ndarray, "n d"]  # a row of nan for a sample that cannot be read
    bad: list[int]  # ids of those


class EmbeddingWriter:
    """Writes blocks into a folder. Every rank has one; ``start`` and ``finish`` run on rank 0 alone."""

    def __init__(self, out: Path, form: Format, samples: int, width: int, dtype: str, identity: dict[str, Any]) -> None:
        """``identity``: what decides the embeddings; an unfinished folder of another identity is refused."""
        self.out, self._form, self._shape, self._dtype = out, form, (samples, width), dtype
        self._identity = {"version": 1, "format": form, "samples": samples, "width": width, "dtype": dtype, **identity}
        self._unfinished = out / UNFINISHED
        self._lock: Lock | None = None

    def start(self, overwrite: bool, held: ExitStack) -> bool:
        """Make the folder, or take up the one that an earlier call began; False: it is complete already.

        ``held`` keeps the lock of the folder. Raises UserError if the folder holds something else, or if another
        process writes to it.
        """
        out, plan = LocalOut(self.out), self._unfinished / PLAN
        if not overwrite and self._is_complete():
            return False
        with disk_errors(f"writing {self.out}"):
            if not (self.out / RECORD).exists() and not plan.exists() and self._holds_others():
                raise UserError(f"{self.out} holds other files: name a folder that is empty or not there")
            self._lock = held.enter_context(out.lock(None))
            if overwrite:
                self._delete(out)
            elif self._is_complete():  # by the process that has held the lock until now
                out.remove_partial()
                return False
            if plan.exists():
                self._check_same(plan, self.out)
                return True
            out.clear_partial(keep="")
            if self._form == "npy":
                np.lib.format.open_memmap(self._unfinished / MATRIX, "w+", np.dtype(self._dtype), self._shape).flush()
            write_json(plan, self._identity)
        return True

    def _is_complete(self) -> bool:
        """Raises UserError if what is complete is of another job."""
        if not (self.out / RECORD).exists():
            return False
        self._check_same(self.out / RECORD, self.out / RECORD)
        return True

    def _holds_others(self) -> bool:
        """Whether the folder holds anything but what a job leaves that is killed before its plan is there."""
        found = {path.name for path in self.out.iterdir()} if self.out.exists() else set()
        begun = {path.name for path in self._unfinished.iterdir()} if UNFINISHED in found else set()
        return bool(found - {UNFINISHED}) or any(name not in (MATRIX, "lock") and ".tmp-" not in name for name in begun)

    def _delete(self, out: LocalOut) -> None:
        """Remove embeddings, the record first, and nothing else that the folder holds."""
        parts = (path.name for path in self.out.glob("embeddings-*") if path.suffix in (".parquet", ".tar"))
        out.remove([RECORD, MATRIX, NAMES, *parts])
        out.clear_partial(keep="")

    def _check_same(self, file: Path, where: Path) -> None:
        with disk_errors(f"reading {file}"):
            try:
                found = read_object(file)
            except ValueError as error:
                raise UserError(f"{error}: name another folder, or add --overwrite") from error
        differ = [key for key, value in self._identity.items() if found.get(key) != value]
        if differ:
            told = "; ".join(f"{key}: there {found.get(key)}, now {self._identity[key]}" for key in differ[:4])
            raise UserError(f"{where} is of another job ({told}): name another folder, or add --overwrite")

    @property
    def blocks(self) -> int:
        return -(-self._shape[0] // BLOCK)

    def missing(self) -> list[int]:
        return [number for number in range(self.blocks) if not self._mark(number).exists()]

    def _mark(self, number: int) -> Path:
        return self._unfinished / f"block-{number:06d}.json"

    def write(self, block: Block) -> None:
        """Write a block and mark it as done. Raises UserError for a full disk."""
        stem = self._unfinished / f"embeddings-{block.number:06d}"
        vectors = block.vectors.astype(self._dtype)
        with disk_errors(f"writing {self.out}"):
            match self._form:
                case "npy":
                    matrix = self._matrix()
                    matrix[block.ids[0] : block.ids[0] + len(block.ids)] = vectors
                    matrix.flush()
                    with atomic_file(stem.with_suffix(".txt")) as file:
                        file.write("".join(f"{escaped(name)}\n" for name in block.names).encode())
                case "parquet":
                    with atomic_file(stem.with_suffix(".parquet")) as file:
                        _write_parquet(block, vectors, file)
                case "webdataset":
                    with atomic_file(stem.with_suffix(".tar")) as file:
                        _write_tar(block, vectors, file)
                case _:
                    assert_never(self._form)
            write_json(self._mark(block.number), {"bad": block.bad})

    def _matrix(self) -> np.memmap:
        try:
            matrix = map_array(self._unfinished / MATRIX, "r+")
        except ValueError as error:
            raise UserError(f"{error}: repeat the command with --overwrite") from error
        if matrix.shape != self._shape or matrix.dtype != np.dtype(self._dtype):
            raise UserError(f"{self._unfinished / MATRIX} is damaged: repeat the command with --overwrite")
        return matrix

    def finish(self, describe: dict[str, Any]) -> list[int]:
        """Put everything in its place; returns the ids of the samples that could not be read."""
        assert not self.missing()
        assert self._lock is not None
        self._lock.check()
        with disk_errors(f"writing {self.out}"):
            bad = [sample for number in range(self.blocks) for sample in self._bad_of(number)]
            if self._form == "npy":
                with atomic_file(self.out / NAMES) as names:
                    for number in range(self.blocks):
                        with open(open_regular(self._unfinished / f"embeddings-{number:06d}.txt"), "rb") as part:
                            shutil.copyfileobj(part, names)
                (self._unfinished / MATRIX).replace(self.out / MATRIX)
            else:
                for path in sorted(self._unfinished.glob("embeddings-*")):
                    path.replace(self.out / path.name)
            write_json(self.out / RECORD, {**self._identity, **describe, "bad_samples": bad})
            shutil.rmtree(self._unfinished)
        return bad

    def _bad_of(self, number: int) -> list[int]:
        mark = self._mark(number)
        try:
            return [int(sample) for sample in read_object(mark)["bad"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{mark} is damaged: delete it, then repeat the command ({error})") from error


def escaped(name: str) -> str:
    """A name on one line, printable anywhere: control characters and lone surrogates as escapes."""
    return printable(name).replace("\n", "\\n")


def _write_parquet(block: Block, vectors: np.ndarray, file: Any) -> None:
    import pyarrow
    import pyarrow.parquet

    width = vectors.shape[1]
    flat = pyarrow.array(vectors.reshape(-1))
    columns = {
        "id": pyarrow.array(block.ids),
        "name": pyarrow.array([name.encode("utf-8", "replace").decode() for name in block.names]),
        "label": pyarrow.array(block.labels),
        "vector": pyarrow.FixedSizeListArray.from_arrays(flat, width),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), file)


def _write_tar(block: Block, vectors: np.ndarray, file: Any) -> None:
    writer = webdataset.TarWriter(file, mtime=0, user="", group="")
    for row, sample in enumerate(block.ids.tolist()):
        array = io.BytesIO()
        np.save(array, vectors[row])
        about = {"id": sample, "name": block.names[row], "label": int(block.labels[row])}
        writer.write({"__key__": f"{sample:012d}", "npy": array.getvalue(), "json": json.dumps(about).encode()})
    writer.close()


class Embeddings:
    """A finished folder of --format npy, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError if the folder is not complete, or of another format."""
        self.folder = folder
        record = folder / RECORD
        if not record.is_file():
            state = "half-written: repeat the embed command" if (folder / UNFINISHED).exists() else "no embeddings"
            raise UserError(f"{folder} is {state} (there is no {RECORD})")
        damaged = f"{folder} holds no embeddings that can be read: embed again with --overwrite"
        try:
            self.about: dict[str, Any] = read_object(record)
            if self.about["format"] != "npy":
                raise UserError(f"{folder} holds embeddings as {self.about['format']}: embed with --format npy")
            samples, width, _, _ = (self.about[key] for key in ("samples", "width", "dataset", "encoder"))
            self.vectors: Float[np.ndarray, "n d"] = map_array(folder / MATRIX)
            self.bad: frozenset[int] = frozenset(map(int, self.about["bad_samples"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{damaged} ({error})") from error
        if self.vectors.shape != (samples, width) or self.vectors.dtype.kind != "f":
            raise UserError(f"{folder / MATRIX} is not the array that {RECORD} describes: embed again")

    def __len__(self) -> int:
        return len(self.vectors)

    @cached_property
    def names(self) -> list[str]:
        """The name of each row, as in names.txt. Raises UserError if it is damaged or missing."""
        try:
            names = read_regular(self.folder / NAMES).decode().splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder / NAMES} cannot be read: embed again with --overwrite ({error})") from error
        if len(names) != len(self):
            raise UserError(f"{self.folder / NAMES} has {len(names)} lines for {len(self)} samples: embed again")
        return names

    def normalised(self, rows_at_once: int) -> Iterator[tuple[int, Float[np.ndarray, "rows d"]]]:
        """(first row, l2-normalised float32 rows) from first to last; rows of nan become zeros, similar to nothing."""
        for start in range(0, len(self), rows_at_once):
            part = np.nan_to_num(np.asarray(self.vectors[start : start + rows_at_once], np.float32))
            yield start, part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12)
