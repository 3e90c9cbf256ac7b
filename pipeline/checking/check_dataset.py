"""Check a whole dataset: list its damage, count its classes, find duplicate images.

dataset.json, samples.npy and DALI's indexes are compared with the tars, shard by shard, in threads (hashing and
decoding release the GIL). Memory is bounded: one shard per thread, and a fixed budget for the search for duplicates.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import tempfile
import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import assert_never

from pipeline.checking.check_shard import CheckOptions, Damage, Findings, Records, ShardFindings, check_shard
from pipeline.checking.remote_copy import fetch, local_copy
from pipeline.common.engine import EngineConfig, ray_engine
from pipeline.common.errors import UserError
from pipeline.common.files import disk_errors, map_array, read_regular
from pipeline.common.locations import WDS, Url
from pipeline.common.system import cores, progress
from pipeline.dataset.dataset import BadSampleError, ShardSet
from pipeline.dataset.format import (
    DATASET_FILE,
    PARTIAL_DIR,
    REENCODED_FILE,
    REJECTED_FILE,
    SAMPLE_DTYPE,
    SAMPLES_FILE,
    file_sha256,
    read_dataset_file,
)
from pipeline.dataset.names import NAME_STARTS_FILE, NAMES_FILE, Names, open_names
from pipeline.dataset.out_folder import RETRY_MINUTES
from pipeline.dataset.remote_cache import CacheConfig
from pipeline.dataset.remote_files import RemoteFolder
from pipeline.dataset.shard_store import LocalShards
from pipeline.sharding.decode_service import Decoders, DecodeService
from pipeline.sharding.workers import worker_decoders

GROUPS_LISTED = 1000  # groups of equal images listed in a report; all are counted
KEYS_AT_ONCE = 1 << 25  # images per pass of the search for duplicates: 256 MB of keys
ROWS_AT_ONCE = 1 << 20  # rows of samples.npy in memory at a time: 32 MB


@dataclass(frozen=True)
class Duplicates:
    """Images that occur more than once, byte for byte."""

    groups: int
    redundant: int  # images beyond the first of each group
    other_labels: int  # groups with more than one label
    listed: tuple[tuple[int, ...], ...]  # sample ids of the first GROUPS_LISTED groups


@dataclass(frozen=True)
class Inspection:
    """Result of a check. ``damage`` must be mended; the other fields are information."""

    path: Path | Url
    samples: int
    shards: int
    bytes: int  # of all tars
    readable_rows: int  # of samples.npy; the counts below are over these
    decoded: int  # images that were decoded
    damage: tuple[Damage, ...]
    class_counts: dict[str, int]  # class name -> samples
    unlabelled: int
    duplicates: Duplicates
    shard_samples: tuple[int, int]  # smallest, largest

    @property
    def fine(self) -> bool:
        return not self.damage

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path), "fine": self.fine}


def inspect_dataset(
    path: Path,
    options: CheckOptions,
    *,
    quiet: bool = False,
    engine: EngineConfig | None = None,
    shards_at: Url | None = None,
) -> Inspection:
    """Check the dataset in folder ``path``. Raises UserError if there is none, or an unfinished one.

    ``engine``: where the shards are checked, by default in threads of this process. ``shards_at``: the URL of the same
    dataset, if ``path`` has no tars and indexes; for Ray, whose workers then fetch them one by one.
    """
    info, damage = read_record(path)
    if info is None:
        return Inspection(path, 0, 0, 0, 0, 0, tuple(damage), {}, 0, Duplicates(0, 0, 0, ()), (0, 0))
    decoded = 0
    with (
        DecodeService() as service,
        ThreadPoolExecutor(options.workers or cores()) as pool,
        progress(quiet, total=info["num_samples"], unit=" images", desc="checking") as bar,
    ):
        records, more = open_records(path, info, service.client)
        damage += more
        match (engine or EngineConfig()).engine:
            case "local":
                all_found = _in_order(pool, records, options, service)
            case "ray":
                assert engine is not None
                all_found = check_on_ray(engine, shards_at or path, len(records.dataset.shards), options)
            case other:
                assert_never(other)
        for shard, found in zip(records.dataset.shards, all_found, strict=True):
            damage += found.damage
            decoded += found.decoded
            bar.update(shard.samples)
    counts, unlabelled = _count_labels(records.dataset)
    if records.dataset.has_labels and unlabelled:
        damage.append(Damage(DATASET_FILE, f"says that all have labels, and {unlabelled:,} have none", 1, ()))
    sizes = [shard.samples for shard in records.dataset.shards]
    return Inspection(
        path=path,
        samples=info["num_samples"],
        shards=len(sizes),
        bytes=sum(shard.bytes for shard in records.dataset.shards),
        readable_rows=len(records.dataset.samples),
        decoded=decoded,
        damage=tuple(damage),
        class_counts=dict(zip(map(str, records.dataset.classes), counts, strict=True)),
        unlabelled=unlabelled,
        duplicates=find_duplicates(records.dataset if shards_at is None else _read_there(records.dataset, shards_at)),
        shard_samples=(min(sizes, default=0), max(sizes, default=0)),
    )


def _read_there(dataset: ShardSet, url: Url) -> ShardSet:
    """The dataset with its images read from ``url``, in ranges."""
    return ShardSet(_RangesOf(url, dataset.info["shards"]), dataset.info, dataset.samples, verify_checksums=True)


class _RangesOf(LocalShards):
    """The shards behind a URL, of which few images are read."""

    def __init__(self, url: Url, shards: list[dict[str, Any]]) -> None:
        super().__init__(Path(), shards)
        self._remote, self._names = RemoteFolder(url, RETRY_MINUTES), [shard["name"] for shard in shards]

    def read(self, shard: int, offset: int, length: int, cancelled: threading.Event) -> bytes:
        """A range of a shard. Raises UserError."""
        return self._remote.read(self._names[shard], offset, length, cancelled)


def check_on_ray(
    config: EngineConfig, place: Path | Url, shards: int, options: CheckOptions
) -> Iterator[ShardFindings]:
    """The findings of each shard in order, from the nodes of a cluster. Raises UserError."""
    place = place.absolute() if isinstance(place, Path) else place
    found: dict[int, ShardFindings] = {}
    with ray_engine(config) as engine:
        following = 0
        for (_, number, _), result in engine.run(_check_there, ((place, number, options) for number in range(shards))):
            found[number] = result
            while following in found:
                yield found.pop(following)
                following += 1


def _check_there(task: tuple[Path | Url, int, CheckOptions]) -> ShardFindings:
    place, number, options = task
    there = _opened_there(place)
    if there.remote is None:
        return check_shard(there.records, number, options)
    shard = there.records.dataset.shards[number]
    names = [name for name in (shard.name, shard.index) if there.remote.has(name)]
    with disk_errors(f"copying {shard.name} of {place}"):
        try:
            for name in names:
                fetch(there.remote, name, there.remote.size(name), there.folder)
            return check_shard(there.records, number, options)
        finally:
            for name in names:
                (there.folder / name).unlink(missing_ok=True)


@dataclass(frozen=True)
class _OpenedThere:
    """A dataset in a worker of a cluster; of a remote one, ``folder`` has the sidecar files."""

    folder: Path
    records: Records
    remote: RemoteFolder | None


@cache
def _opened_there(place: Path | Url) -> _OpenedThere:
    """Once in each worker process. What the whole files are worth, the main process finds."""
    folder, remote = place, None
    if isinstance(place, Url):
        remote = RemoteFolder(place, RETRY_MINUTES)
        copy = local_copy(place, CacheConfig(cache_dir=Path(tempfile.gettempdir())), shards=False, quiet=True)
        folder = copy.__enter__()
        atexit.register(copy.__exit__, None, None, None)
    assert isinstance(folder, Path)
    info, _ = read_record(folder)
    if info is None:
        raise UserError(f"{place} has no {DATASET_FILE} here: it must lie on a file system that all nodes share")
    records, _ = open_records(folder, info, worker_decoders(), hashes=False)
    return _OpenedThere(folder, records, remote)


def _in_order(
    pool: ThreadPoolExecutor, records: Records, options: CheckOptions, service: DecodeService
) -> Iterator[ShardFindings]:
    """The findings of each shard in order; a few shards are checked ahead."""
    numbers = iter(range(len(records.dataset.shards)))

    def start(count: int) -> Iterator[Future[ShardFindings]]:
        return (pool.submit(check_shard, records, number, options) for number in islice(numbers, count))

    running = deque(start(2 * (options.workers or cores())))
    try:
        while running:
            while not wait(list(running)[:1], timeout=0.2).done:
                service.start_if_wanted()
            yield running.popleft().result()
            running.extend(start(1))
    finally:
        for future in running:
            future.cancel()


def read_record(path: Path) -> tuple[dict[str, Any] | None, list[Damage]]:
    """(dataset.json if it can be read, damage of dataset.json itself)."""
    found = Findings(DATASET_FILE)
    lost = path.is_dir() and not (path / DATASET_FILE).exists()
    if lost and not (path / PARTIAL_DIR).exists() and any(path.glob("*.tar")):
        found.add("is missing")
        return None, found.damage()
    try:
        info = read_dataset_file(path, check_files=False)
    except UserError as error:
        if not (path / DATASET_FILE).exists() or "format version" in str(error):
            raise
        found.add("cannot be read", str(error))
        return None, found.damage()
    recorded = sum(shard["samples"] for shard in info["shards"])
    if recorded != info["num_samples"]:
        found.add("does not add up", f"{info['num_samples']:,} samples in all, {recorded:,} in its shards")
    return info, found.damage()


def open_records(
    path: Path, info: dict[str, Any], decoders: Decoders, *, hashes: bool = True
) -> tuple[Records, list[Damage]]:
    """The sidecar files of a dataset, and their damage; ``hashes``: compare them with their sha256 too."""
    found = Findings(SAMPLES_FILE)
    samples = np.zeros(0, SAMPLE_DTYPE)
    try:
        loaded = map_array(path / SAMPLES_FILE)
        if loaded.dtype != SAMPLE_DTYPE or loaded.ndim != 1:
            found.add("holds something else than a dataset's rows")
        else:
            samples = loaded
            if hashes and file_sha256(path / SAMPLES_FILE) != info["samples_sha256"]:
                found.add("is not the one recorded: its sha256 differs")
    except FileNotFoundError:
        found.add("is missing")
    except (OSError, ValueError) as error:
        found.add("cannot be read", str(error))
    dataset = ShardSet(LocalShards(path, info["shards"]), info, samples, verify_checksums=True)
    ends = np.cumsum([0, *(shard.samples for shard in dataset.shards)])
    if len(samples) and len(samples) != ends[-1]:
        found.add("has another number of rows", f"{len(samples):,} instead of {ends[-1]:,}")
    foreign = info["source"].startswith(WDS)
    in_rejected, in_reencoded, in_names = Findings(REJECTED_FILE), Findings(REENCODED_FILE), Findings(NAMES_FILE)
    refused = read_entries(path / REJECTED_FILE, in_rejected) if foreign else []
    if len(read_entries(path / REENCODED_FILE, in_reencoded)) != sum(info.get("reencoded", {}).values()):
        in_reencoded.add("has another number of entries than recorded")
    names = _open_names(path, info, in_names, hashes)
    damage = [one for each in (found, in_rejected, in_reencoded, in_names) for one in each.damage()]
    return Records(
        dataset, np.minimum(ends, len(samples)), names, decoders, frozenset(name for name, _ in refused), foreign
    ), damage


def _open_names(path: Path, info: dict[str, Any], found: Findings, hashes: bool) -> Names | None:
    try:
        names = open_names(path, info)
        for name, sha256 in ((NAMES_FILE, "sha256"), (NAME_STARTS_FILE, "starts_sha256")):
            if hashes and names is not None and file_sha256(path / name) != info["names"].get(sha256):
                found.add("is not the one recorded", f"the sha256 of {name} differs")
        return names
    except UserError as error:
        found.add("cannot be used", str(error))
        return None


def read_entries(file: Path, found: Findings) -> list[tuple[str, str]]:
    """(name, reason) of every line of rejected.jsonl or reencoded.jsonl; empty if the file is missing."""
    try:
        lines = [json.loads(line) for line in read_regular(file).splitlines()]
        return [(str(line["name"]), str(line["reason"])) for line in lines]
    except FileNotFoundError:
        return []  # training does not need it
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        found.add("cannot be read")
        return []


def _chunks(rows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), ROWS_AT_ONCE):
        yield rows[start : start + ROWS_AT_ONCE]


def _count_labels(dataset: ShardSet) -> tuple[list[int], int]:
    counts, unlabelled = np.zeros(len(dataset.classes), np.int64), 0
    for rows in _chunks(dataset.samples):
        labels = rows["label"]
        unlabelled += int((labels == -1).sum())
        counts += np.bincount(labels[(labels >= 0) & (labels < len(counts))], minlength=len(counts))
    return counts.tolist(), unlabelled


def find_duplicates(dataset: ShardSet) -> Duplicates:
    """Images with equal bytes: candidates by length and crc32 from samples.npy, confirmed by sha256."""
    groups = redundant = other_labels = 0
    listed: list[tuple[int, ...]] = []
    for candidates in _candidates(dataset.samples):
        for group in _confirmed(dataset, candidates):
            groups, redundant = groups + 1, redundant + len(group) - 1
            other_labels += len(set(dataset.labels(group).tolist())) > 1
            if len(listed) < GROUPS_LISTED:
                listed.append(group)
    return Duplicates(groups, redundant, other_labels, tuple(sorted(listed)))


def _candidates(samples: np.ndarray) -> Iterator[list[int]]:
    """Sample ids of equal length and crc32. Each pass covers the share of all checksums that fits into memory."""
    passes = 1 << max(0, -(-len(samples) // KEYS_AT_ONCE) - 1).bit_length()
    for number in range(passes):
        keys, ids = _keys_of_pass(samples, number, passes)
        order = np.argsort(keys, kind="stable")
        keys, ids = keys[order], ids[order]
        starts = np.flatnonzero(np.diff(keys, prepend=keys[:1] + np.uint64(1)))
        ends = np.append(starts[1:], len(keys))
        for start, end in zip(starts[ends - starts > 1], ends[ends - starts > 1], strict=True):
            yield ids[start:end].tolist()


def _keys_of_pass(samples: np.ndarray, number: int, passes: int) -> tuple[np.ndarray, np.ndarray]:
    keys: list[np.ndarray] = [np.zeros(0, np.uint64)]
    ids: list[np.ndarray] = [np.zeros(0, np.int64)]
    first = 0
    for rows in _chunks(samples):
        mine = np.flatnonzero(rows["checksum"] % np.uint32(passes) == number)
        chosen = rows[mine]
        keys.append(chosen["checksum"].astype(np.uint64) << np.uint64(32) | chosen["length"].astype(np.uint64))
        ids.append(first + mine)
        first += len(rows)
    return np.concatenate(keys), np.concatenate(ids)


def _confirmed(dataset: ShardSet, candidates: list[int]) -> Iterator[tuple[int, ...]]:
    by_content: dict[bytes, list[int]] = defaultdict(list)
    for sample_id in candidates:
        try:
            by_content[hashlib.sha256(dataset.read(sample_id)).digest()].append(sample_id)
        except BadSampleError:
            continue  # reported by the check of its shard
    yield from (tuple(group) for group in by_content.values() if len(group) > 1)
