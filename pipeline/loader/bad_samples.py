"""Bad samples of a run: each is reported once, recorded, replaced by the next good one, and limited in number.

The rule of replacement: sample i that cannot be read or decoded is replaced by (i + 1) mod num_samples, and again until
one is good, with that sample's own views; in a mixture within its dataset. It is a function of integers and of what is
on disk, so every rank and every resumed run replaces alike.
"""

from __future__ import annotations

import copy
import itertools
import json
import sys
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError
from pipeline.common.files import disk_errors, own_file
from pipeline.common.locks import make_exclusive
from pipeline.dataset.dataset import BadSampleError

BAD_SAMPLES_FILE = "bad_samples.jsonl"


def print_bad_sample(error: BadSampleError) -> None:
    """The default report of a bad sample: one line on stderr."""
    print(f"bad sample, replaced by the next one: {error}", file=sys.stderr, flush=True)


class BadSamples:
    """The samples that were found bad. Thread-safe."""

    def __init__(
        self,
        num_samples: int,
        limit: int,
        report: Callable[[BadSampleError], None] = print_bad_sample,
        file: Path | None = None,
        first_samples: Sequence[int] = (0,),
    ) -> None:
        """``report`` is called once for each bad sample; more than ``limit`` of them are an error.

        ``file``: bad_samples.jsonl of a run folder. The limit then counts its lines, those of all ranks and sessions of
        the run. ``first_samples``: the first id of each dataset of a mixture.
        """
        self._limit, self._report, self._file = limit, report, file
        self._edges = [*first_samples, num_samples]
        self._found: dict[int, BadSampleError] = {}
        self._lock = threading.Lock()

    def __contains__(self, sample_id: int) -> bool:
        return sample_id in self._found

    def candidates(self, sample_id: int) -> Iterator[int]:
        """The samples that may take the place of ``sample_id``, itself first, without those known to be bad."""
        first, end = self._dataset_of(sample_id)
        for source in itertools.chain(range(sample_id, end), range(first, sample_id)):
            if source not in self:
                yield source

    def _dataset_of(self, sample_id: int) -> tuple[int, int]:
        """The first id of the sample's dataset, and that behind its last one."""
        number = bisect_right(self._edges, sample_id) - 1
        return self._edges[number], self._edges[number + 1]

    def add(self, error: BadSampleError) -> None:
        """Add a sample. Raises UserError with the list when there are too many, or when the disk is full."""
        # A copy has no traceback. Its frames refer to the loader, to this object in it, and to images: in such a cycle
        # the loader would stay until a full collection, which is as good as never due.
        error = copy.copy(error)
        with self._lock:
            if error.sample_id in self._found:
                return
            self._found[error.sample_id] = error
            found = list(self._found.values())
        self._report(error)
        if self._file is not None:
            found = self._recorded(self._file, error)
        if len(found) > self._limit:
            listing = "\n  ".join(map(str, found))
            raise UserError(
                f"{len(found)} bad samples, more than the {self._limit} allowed by --max-bad-samples:\n  {listing}\n"
                f"{_advice(found)}, or allow more"
            )

    def _recorded(self, path: Path, error: BadSampleError) -> list[BadSampleError]:
        """Append ``error`` to the file unless its sample has a line; returns all that it holds."""
        first, end = self._dataset_of(error.sample_id)
        line = {
            "sample": error.sample_id,
            "shard": error.shard,
            "key": error.key,
            "reason": error.reason,
            "replacement": error.sample_id + 1 if error.sample_id + 1 < end else first,
            **({"as_sharded": True} if error.as_sharded else {}),
        }
        with disk_errors(f"writing {path}"), open(path, "a+b", opener=own_file) as file:
            make_exclusive(file)  # other ranks and threads wait
            file.seek(0)
            complete, newline, torn = file.read().rpartition(b"\n")
            if torn:  # the last line of a killed run
                file.truncate(len(complete + newline))
            lines = [line for line in map(_parse, complete.split(b"\n")) if line is not None]
            if all(line["sample"] != known["sample"] for known in lines):
                file.write(json.dumps(line).encode() + b"\n")
                lines.append(line)
        return [
            BadSampleError(bad["sample"], bad["shard"], bad["key"], bad["reason"], bad.get("as_sharded", False))
            for bad in lines
        ]


def _parse(text: bytes) -> dict[str, Any] | None:
    """One line of the file; None for a damaged one, which stays there and does not count."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("sample")) is not int:
        return None
    return line if all(isinstance(line.get(name), str) for name in ("shard", "key", "reason")) else None


def _advice(found: list[BadSampleError]) -> str:
    """What to do about bad samples. Where no byte has changed since they were written, the disk is not at fault."""
    if not all(error.as_sharded for error in found):
        return "Check the disk, write the dataset again"
    return (
        "Their bytes are those that were sharded. tools/check_shards.py --decode full finds all such images; shard "
        "their source with this version, which refuses them or with --reencode stores their pixels"
    )
