"""Listing at scale: time, memory and disk for 1e6, 1e7 and 1e8 names: python benchmarks/listing.py

A synthetic lister gives the pages that a bucket would give (1000 names each, in order, with sizes and versions), a
thousand images in each folder. Each case is a process of its own, which does what make_shards.py does between the
bucket's answers and the first image: the listing, the labels by folder, the fingerprint, the saved columns, and the
images of some shards by the keyed permutation. The network is not part of it. Memory is private memory (RssAnon), at
most; the pages of mapped files are the system's.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from pipeline.common.errors import UserError, exit_on_user_error
from pipeline.common.locations import LocalPath
from pipeline.sampling.order import sharding_order
from pipeline.sources.labels import label_by_folder
from pipeline.sources.listing import Listing, ListingBuilder, rows_of
from tools.common.measuring import describe_machine, write_results

ONE_CASE = "one-case"  # first argument of a process that measures one number of names
PAGE = 1000  # names of a page, and of a folder
SHARD = 2048
SHARDS_TIMED = 20
BYTES_A_NAME = 170  # of the temporary columns and the saved ones, with some room


@dataclass(frozen=True)
class Config:
    """Flags of listing.py."""

    names: tuple[float, ...] = (1e6, 1e7, 1e8)
    """Numbers of names."""
    place: LocalPath | None = None
    """Folder for the listing (default: the system's temporary folder)."""
    json: LocalPath | None = None
    """Write the results to this JSON file."""


def main() -> None:
    """The command."""
    if sys.argv[1:2] == [ONE_CASE]:
        print(json.dumps(measure(int(sys.argv[2]), Path(sys.argv[3]))))
        return
    config = tyro.cli(Config, description=__doc__)
    place = config.place or Path(tempfile.gettempdir())
    needed, free = max(config.names) * BYTES_A_NAME, shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"{place} has {free / 1e9:.0f} GB free, and this takes {needed / 1e9:.0f}: choose another --place"
        )
    print(describe_machine(), flush=True)
    print(
        f"{'names':>12} {'list s':>8} {'label s':>8} {'hash s':>8} {'save s':>8} {'shard ms':>9} {'MiB':>6} {'GB':>7}"
    )
    results = []
    for names in config.names:
        with tempfile.TemporaryDirectory(prefix="listing-", dir=place) as folder:
            command = [sys.executable, __file__, ONE_CASE, str(int(names)), folder]
            row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        results.append(row)
        print(
            f"{row['names']:12,} {row['list_s']:8.1f} {row['label_s']:8.1f} {row['hash_s']:8.1f} {row['save_s']:8.1f} "
            f"{row['shard_ms']:9.1f} {row['memory_mib']:6.0f} {row['disk_gb']:6.2f}",
            flush=True,
        )
    if config.json is not None:
        write_results(config.json, {"listing": results})


def measure(count: int, folder: Path) -> dict[str, Any]:
    """One case; times are CPU seconds of this process."""
    peak = _Peak()
    clock = time.process_time()
    builder = ListingBuilder("synthetic")
    for page in range(count // PAGE):
        names = [f"{page:06d}/{number:09d}.jpg" for number in range(page * PAGE, (page + 1) * PAGE)]
        builder.add_files(names, range(110_000, 110_000 + PAGE), range(1, PAGE + 1))
    listing = builder.build()
    list_s, clock = time.process_time() - clock, time.process_time()
    listing = label_by_folder(listing, "synthetic", "folders")
    label_s, clock = time.process_time() - clock, time.process_time()
    listing.fingerprint()
    hash_s, clock = time.process_time() - clock, time.process_time()
    listing.save(folder / "listing")
    save_s = time.process_time() - clock
    mapped = Listing.load(folder / "listing")
    clock = time.process_time()
    for shard in range(SHARDS_TIMED):
        start = shard * (count // SHARD // SHARDS_TIMED) * SHARD
        rows_of(mapped, sharding_order(count, 0, np.arange(start, start + SHARD)))
    shard_ms = 1e3 * (time.process_time() - clock) / SHARDS_TIMED
    return {
        "names": len(listing),
        "list_s": list_s,
        "label_s": label_s,
        "hash_s": hash_s,
        "save_s": save_s,
        "shard_ms": shard_ms,
        "memory_mib": peak.end(),
        "disk_gb": sum(file.stat().st_size for file in (folder / "listing").iterdir()) / 1e9,
    }


class _Peak:
    """The most private memory of this process, looked at ten times a second."""

    def __init__(self) -> None:
        self._most, self._ended = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(0.1):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    self._most = max(self._most, int(line.split()[1]) / 1024)

    def end(self) -> float:
        """MiB."""
        self._ended.set()
        self._thread.join()
        return self._most


if __name__ == "__main__":
    exit_on_user_error(main)
