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
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import webdataset
from jaxtyping import Float, Int64
from typing_extensions import assert_never

from pipeline.common.errors import UserError
from pipeline.common.files import atomic_file, disk_errors, write_json
from pipeline.common.text import printable

RECORD, MATRIX, NAMES, UNFINISHED = "_embeddings.json", "embeddings.npy", "names.txt", ".partial"
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

    def start(self, overwrite: bool) -> bool:
        """Make the folder, or take up the one that an earlier call began; False: it is complete already.

        Raises UserError if the folder holds something else.
        """
        with disk_errors(f"writing {self.out}"):
            if overwrite and (self.out / UNFINISHED).exists() | (self.out / RECORD).exists():
                shutil.rmtree(self.out)
            if (self.out / RECORD).exists():
                self._check_same(json.loads((self.out / RECORD).read_text()), self.out / RECORD)
                return False
            plan = self._unfinished / "plan.json"
            if plan.exists():
                self._check_same(json.loads(plan.read_text()), self.out)
                return True
            if self.out.exists() and any(self.out.iterdir()):
                raise UserError(f"{self.out} holds other files: name a folder that is empty or not there")
            self._unfinished.mkdir(parents=True)
            if self._form == "npy":
                np.lib.format.open_memmap(self._unfinished / MATRIX, "w+", np.dtype(self._dtype), self._shape).flush()
            write_json(plan, self._identity)
        return True

    def _check_same(self, found: dict[str, Any], where: Path) -> None:
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
                    matrix = np.load(self._unfinished / MATRIX, mmap_mode="r+")
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

    def finish(self, describe: dict[str, Any]) -> list[int]:
        """Put everything in its place; returns the ids of the samples that could not be read."""
        assert not self.missing()
        with disk_errors(f"writing {self.out}"):
            marks = [json.loads(self._mark(number).read_text()) for number in range(self.blocks)]
            bad = [sample for mark in marks for sample in mark["bad"]]
            if self._form == "npy":
                with atomic_file(self.out / NAMES) as names:
                    for number in range(self.blocks):
                        with open(self._unfinished / f"embeddings-{number:06d}.txt", "rb") as part:
                            shutil.copyfileobj(part, names)
                (self._unfinished / MATRIX).replace(self.out / MATRIX)
            else:
                for path in sorted(self._unfinished.glob("embeddings-*")):
                    path.replace(self.out / path.name)
            write_json(self.out / RECORD, {**self._identity, **describe, "bad_samples": bad})
            shutil.rmtree(self._unfinished)
        return bad


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
        self.about: dict[str, Any] = json.loads(record.read_text())
        if self.about.get("format") != "npy":
            raise UserError(f"{folder} holds embeddings as {self.about.get('format')}: embed with --format npy")
        self.vectors: Float[np.ndarray, "n d"] = np.load(folder / MATRIX, mmap_mode="r")
        if self.vectors.shape != (self.about["samples"], self.about["width"]):
            raise UserError(f"{folder / MATRIX} is not the array that {RECORD} describes: embed again")
        self.bad: frozenset[int] = frozenset(self.about["bad_samples"])

    def __len__(self) -> int:
        return len(self.vectors)

    @cached_property
    def names(self) -> list[str]:
        """The name of each row, as in names.txt."""
        return (self.folder / NAMES).read_text(encoding="utf-8").splitlines()

    def normalised(self, rows_at_once: int) -> Iterator[tuple[int, Float[np.ndarray, "rows d"]]]:
        """(first row, l2-normalised float32 rows) from first to last; rows of nan become zeros, similar to nothing."""
        for start in range(0, len(self), rows_at_once):
            part = np.nan_to_num(np.asarray(self.vectors[start : start + rows_at_once], np.float32))
            yield start, part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12)
