"""Owns the comparison of a large samples.npy with what dataset.json records of it, beside the work that uses it.

Where an image lies and its checksum are compared with its bytes at every read, so a wrong row of that kind is a bad
sample. A wrong label or size would be noticed by nothing, and hashing 28 GB takes half a minute: so it is done in a
thread, and whoever is about to rely on the result waits for it.
"""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from pipeline.common.errors import UserError

ROWS_AT_ONCE = 1 << 16  # 1.8 MB: long enough that the interpreter's lock is free nearly all the time


class RowCheck:
    """One comparison, running in a thread of this process that ends with it."""

    def __init__(self, file: Path, rows: np.memmap, sha256: str, classes: int, remedy: str) -> None:
        """Start hashing ``file``, which ``rows`` (SAMPLE_DTYPE[num_samples]) maps; labels must be below ``classes``.

        ``remedy`` ends the message for a file that is wrong.
        """
        self._verdict: Future[None] = Future()
        arguments = (file, rows.offset, rows.dtype, sha256, classes, remedy)
        threading.Thread(target=self._run, args=arguments, name="row-check", daemon=True).start()

    def _run(self, file: Path, header: int, dtype: np.dtype, sha256: str, classes: int, remedy: str) -> None:
        try:
            compare_rows(file, header, dtype, sha256, classes, remedy)
        except BaseException as error:  # noqa: BLE001  handed on to those who wait, whatever it is
            self._verdict.set_exception(error)
        else:
            self._verdict.set_result(None)

    def raise_if_wrong(self) -> None:
        """Raise UserError if the file has turned out to be wrong so far; does not wait."""
        if self._verdict.done():
            self._verdict.result()

    def wait(self) -> None:
        """Wait until the whole file is compared. Raises UserError if it is wrong or cannot be read."""
        self._verdict.result()


def compare_rows(file: Path, header: int, dtype: np.dtype, sha256: str, classes: int, remedy: str) -> None:
    """Read ``file`` from end to end: rows of ``dtype`` after ``header`` bytes. Raises UserError if it is wrong."""
    digest, highest = hashlib.sha256(), -1
    try:
        with open(file, "rb") as stream:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            digest.update(stream.read(header))
            while piece := stream.read(ROWS_AT_ONCE * dtype.itemsize):
                digest.update(piece)
                rows = np.frombuffer(piece, dtype, len(piece) // dtype.itemsize)
                highest = max(highest, int(rows["label"].max(initial=-1)))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; {remedy}") from error
    if digest.hexdigest() != sha256:
        raise UserError(
            f"{file} is damaged or belongs to another dataset (hashed since the start; no checkpoint and no accuracy "
            f"rests on it): {remedy}"
        )
    if highest >= classes:
        raise UserError(f"{file} has label {highest}, but dataset.json names {classes} classes: {remedy}")
