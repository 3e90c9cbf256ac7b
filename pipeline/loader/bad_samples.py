"""Bad samples: limit, report, bad_samples.jsonl."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from pipeline.common.errors import UserError
from pipeline.common.files import disk_errors, make_exclusive
from pipeline.dataset.dataset import BadSampleError


class BadSamples:
    """The samples found bad so far. Thread-safe."""

    def __init__(self, limit: int, report: Callable[[BadSampleError], None]) -> None:
        """``report`` hears of each bad sample once; beyond ``limit`` of them, UserError."""
        self._limit = limit
        self._report = report
        self._found: dict[int, BadSampleError] = {}
        self._lock = threading.Lock()

    def __contains__(self, sample_id: int) -> bool:
        """Whether a sample is known to be bad."""
        return sample_id in self._found

    def add(self, error: BadSampleError) -> None:
        """Note one. Raises UserError with the list when there are too many."""
        with self._lock:
            if error.sample_id in self._found:
                return
            self._found[error.sample_id] = error
            found = list(self._found.values())
        self._report(error)
        if len(found) > self._limit:
            raise too_many_bad_samples(found, self._limit)


def too_many_bad_samples(found: list[BadSampleError], limit: int) -> UserError:
    """The error that ends a run, with the list."""
    listing = "\n  ".join(map(str, found))
    return UserError(
        f"{len(found)} bad samples, more than the {limit} allowed by --max-bad-samples:\n  {listing}\n"
        "Check the disk, write the dataset again, or allow more"
    )


def print_bad_sample(error: BadSampleError) -> None:
    """The default report of a bad sample: one line on stderr."""
    print(f"bad sample, replaced by the next one: {error}", file=sys.stderr, flush=True)


BAD_SAMPLES_FILE = "bad_samples.jsonl"


class BadSampleRecord:
    """Called with each bad sample by the loader's threads: prints it and records it."""

    def __init__(self, run_dir: Path, num_samples: int, limit: int) -> None:
        """More than ``limit`` samples, over all ranks and sessions of the run, end it."""
        self._path = run_dir / BAD_SAMPLES_FILE
        self._num_samples = num_samples
        self._limit = limit

    def __call__(self, error: BadSampleError) -> None:
        """Record a sample. Raises UserError if the run has too many, or the disk is full."""
        print_bad_sample(error)
        line = {
            "sample": error.sample_id,
            "shard": error.shard,
            "key": error.key,
            "reason": error.reason,
            "replacement": (error.sample_id + 1) % self._num_samples,
        }
        with disk_errors(f"writing {self._path}"), open(self._path, "a+b") as file:
            lines = _add(file, line)
        if len(lines) > self._limit:
            found = [BadSampleError(bad["sample"], bad["shard"], bad["key"], bad["reason"]) for bad in lines]
            raise too_many_bad_samples(found, self._limit)


def _add(file: IO[bytes], line: dict[str, Any]) -> list[dict[str, Any]]:
    """Append ``line`` unless its sample has one; gives all lines. Other ranks and threads wait for the lock."""
    make_exclusive(file)
    file.seek(0)
    whole, newline, torn = file.read().rpartition(b"\n")
    if torn:  # a killed run's last line
        file.truncate(len(whole + newline))
    lines = [json.loads(text) for text in whole.splitlines()]
    if all(line["sample"] != known["sample"] for known in lines):
        file.write(json.dumps(line).encode() + b"\n")
        lines.append(line)
    return lines
