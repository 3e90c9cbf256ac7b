"""Compares a large samples.npy with its sha256 in dataset.json, in a thread while the dataset is already in use.

A wrong offset, length or checksum shows at the read of the image, as a bad sample. A wrong label or size would go
unnoticed, and hashing 28 GB takes half a minute. So the file is hashed in a thread, and code that relies on labels
waits for the result.
"""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from pipeline.common.errors import UserError
from pipeline.common.files import open_regular

ROWS_AT_ONCE = 1 << 16  # 1.8 MB: enough work without the GIL in each call


class RowCheck:
    """One comparison, in a daemon thread."""

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
        except BaseException as error:  # noqa: BLE001  passed on to the callers of wait
            self._verdict.set_exception(error)
        else:
            self._verdict.set_result(None)

    def raise_if_wrong(self) -> None:
        """Raise UserError if the file is already known to be wrong; does not wait."""
        if self._verdict.done():
            self._verdict.result()

    def wait(self) -> None:
        """Wait until the file is compared. Raises UserError if it is wrong or cannot be read."""
        self._verdict.result()


def compare_rows(file: Path, header: int, dtype: np.dtype, sha256: str, classes: int, remedy: str) -> None:
    """Read ``file`` from end to end: rows of ``dtype`` after ``header`` bytes. Raises UserError if it is wrong."""
    digest, highest = hashlib.sha256(), -1
    try:
        with open(open_regular(file), "rb") as stream:
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
            f"is based on it): {remedy}"
        )
    if highest >= classes:
        raise UserError(f"{file} has label {highest}, but dataset.json names {classes} classes: {remedy}")
