"""Owns bad_samples.jsonl in the run folder: each sample that training could not use, once, whichever rank found it.

A line holds sample (its id), shard, key, reason and replacement: the id that the rule of replacement puts in its place
(where that one is bad as well, it has a line of its own). A resumed run finds the same samples again and adds nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

from pipeline.assemble import too_many_bad_samples
from pipeline.disk import disk_errors, make_exclusive
from pipeline.loader import print_bad_sample
from pipeline.shards import BadSampleError

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
