"""Owns the making of a dataset: sources -> shards, in parallel, verified, atomic, resumable.

Everything unfinished lies in OUT/.partial: the listing of the source, the order, and a marker for each finished shard.
A run that was killed goes on with the shards that have no marker. dataset.json is written last: only then is OUT
a dataset.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pipeline.disk import atomic_file, disk_error, exclusive_lock, write_json
from pipeline.errors import UserError
from pipeline.foreign import IndexJob, listing_fingerprint, open_tars
from pipeline.label_file import dataset_classes
from pipeline.listing import Listing
from pipeline.options import ShardingOptions
from pipeline.shard_file import Job, WriteJob, keep_torch_out
from pipeline.shards import (
    DATASET_FILE,
    FORMAT_VERSION,
    PARTIAL_DIR,
    REJECTED_FILE,
    SAMPLE_DTYPE,
    SAMPLES_FILE,
    file_sha256,
    read_dataset_file,
)
from pipeline.sources import open_source

WDS = "wds:"  # SOURCE: tars made by others
_REPORT_EVERY = 32  # pictures between two looks at the shared counters


@dataclass(frozen=True)
class Summary:
    """What a call of make_dataset did."""

    out: Path
    complete: bool  # False: other parts are still missing
    shards: int
    pictures: int
    rejected: dict[str, int]  # reason -> count
    bytes: int  # of all tars
    classes: int
    seconds: float
    already_there: bool = False  # the dataset was complete before the call


def make_dataset(
    source: str, out: str | Path, options: ShardingOptions | None = None, *, quiet: bool = False
) -> Summary:
    """Write the pictures of SOURCE as a dataset into folder ``out``; go on if an earlier call was interrupted.

    The bytes written depend on the pictures, the seed and the options, not on the number of workers or interruptions.
    ``quiet`` turns the progress bar off. Raises UserError for everything a user can mend: a missing source, a full
    disk, an interrupted run with other options, no usable picture, ...
    """
    options = options or ShardingOptions()
    options.check()
    out, started = Path(out), time.monotonic()
    try:
        _check_place(source, out)
        if options.overwrite:
            remove_dataset(out)
        if (out / DATASET_FILE).exists():
            return _already_complete(source, out, options, started)
        (out / PARTIAL_DIR).mkdir(parents=True, exist_ok=True)
        with exclusive_lock(out / PARTIAL_DIR / "lock", shared=options.part is not None) as lock:
            job, about = _prepare(source, out, options, quiet)
            _build_missing(job, options, quiet)
            if options.part is not None:  # parts run side by side; completing is for one of them
                fcntl.flock(lock, fcntl.LOCK_EX)
                if (out / DATASET_FILE).exists():
                    return _already_complete(source, out, options, started)
            return _complete(job, about, started)
    except OSError as error:
        mended = disk_error(error, f"writing the dataset to {out}")
        if mended is None:
            raise
        raise mended from error
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, most likely for lack of memory: run the same command again with fewer "
            "--workers; it goes on with the missing shards"
        ) from error


def remove_dataset(out: Path) -> None:
    """Delete a dataset's own files in ``out``, dataset.json first; other files stay."""
    for name in (DATASET_FILE, SAMPLES_FILE, REJECTED_FILE):
        (out / name).unlink(missing_ok=True)
    for file in _own_shards(out):
        file.unlink()
    if (out / PARTIAL_DIR).exists():
        shutil.rmtree(out / PARTIAL_DIR)


def _own_shards(out: Path) -> list[Path]:
    return [f for suffix in ("tar", "idx") for f in out.glob(f"shard-[0-9][0-9][0-9][0-9][0-9][0-9].{suffix}")]


def _check_place(source: str, out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"OUT {out} is a file: give a folder")
    folder = Path(source)
    if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"OUT {out} lies inside SOURCE {source}: its shards would become part of the source; choose another folder"
        )
    started = (out / DATASET_FILE).exists() or (out / PARTIAL_DIR).exists()
    if not started and out.is_dir() and (_own_shards(out) or (out / SAMPLES_FILE).exists()):
        raise UserError(
            f"{out} has shards but no {DATASET_FILE}: choose an empty folder, or say --overwrite to delete them"
        )


def _already_complete(source: str, out: Path, options: ShardingOptions, started: float) -> Summary:
    info = read_dataset_file(out)
    wanted = {"source": source_title(source), **options.recipe()}
    there = {"source": info["source"], **info["recipe"]}
    if differences := _differences(there, wanted):
        raise UserError(
            f"{out} holds a complete dataset made with other options ({differences}): choose another folder, "
            "or say --overwrite to replace it"
        )
    if (out / PARTIAL_DIR).exists():  # the last run ended between its last two actions
        shutil.rmtree(out / PARTIAL_DIR)
    return _summary(out, info, started, already_there=True)


def source_title(source: str) -> str:
    """SOURCE as dataset.json records it: without folders, so that it is the same on every machine."""
    kind, colon, rest = source.partition(":")
    if colon and kind in ("synthetic", "wds"):
        return f"{kind}:{os.path.basename(rest)}"
    return Path(source).resolve().name


def _differences(there: dict[str, Any], wanted: dict[str, Any]) -> str:
    names = [n for n in {**there, **wanted} if there.get(n) != wanted.get(n)]
    flags = {n: "SOURCE" if n == "source" else "--" + n.replace("_", "-") for n in names}
    return "; ".join(f"{flags[n]} was {there.get(n)}, now {wanted.get(n)}" for n in names)


def _prepare(source: str, out: Path, options: ShardingOptions, quiet: bool) -> tuple[Job, dict[str, Any]]:
    """List the source, compare with what an interrupted run left, and lay the job out in OUT/.partial."""
    job_file = out / PARTIAL_DIR / "job.json"
    earlier = json.loads(job_file.read_text()) if job_file.exists() else None
    about: dict[str, Any] = {"recipe": {"source": source_title(source), **options.recipe()}}
    if earlier is not None and (differences := _differences(earlier["recipe"], about["recipe"])):
        raise UserError(
            f"{out} has an interrupted run with other options ({differences}): repeat its options to go on with it, "
            "or say --overwrite to start again"
        )
    job: Job
    if source.startswith(WDS):
        tars = open_tars(source.removeprefix(WDS), options)
        known = [] if options.classes_from is None else list(dataset_classes(options.classes_from))
        about.update(fingerprint=listing_fingerprint(tars), classes=known, rejected=[])
        job = IndexJob(out, tars, options)
    else:
        found = open_source(source, options, out / PARTIAL_DIR, quiet=quiet)
        about.update(fingerprint=found.listing.fingerprint(), classes=list(found.listing.classes))
        about["rejected"] = [[r.name, r.reason] for r in found.listing.rejected]
        if earlier is None:
            _lay_out(found.listing, out, options)
        job = WriteJob(out, found.reader, options)
    if earlier is None:
        write_json(job_file, about)
    elif earlier["fingerprint"] != about["fingerprint"]:
        raise UserError(
            f"{source} has changed since the interrupted run in {out} began (pictures were added, removed, renamed or "
            "have another length): restore it to go on, or say --overwrite to start again"
        )
    return job, about


def _lay_out(listing: Listing, out: Path, options: ShardingOptions) -> None:
    """Save the listing and the order for the workers. numpy keeps PCG64's permutation stable across versions."""
    listing.save(out / PARTIAL_DIR / "listing")
    order = np.random.Generator(np.random.PCG64(options.seed)).permutation(len(listing))
    with atomic_file(out / PARTIAL_DIR / "order.npy") as file:
        np.save(file, order[: options.limit])


def _build_missing(job: Job, options: ShardingOptions, quiet: bool) -> None:
    part, parts = options.part_of()
    records = {n: job.done(n) for n in range(len(job))}
    missing = [n for n in range(part, len(job), parts) if records[n] is None]
    finished = sum(r["shard"]["samples"] + len(r["rejected"]) for r in records.values() if r is not None)
    workers = min(options.workers or len(os.sched_getaffinity(0)), len(missing))
    with tqdm(
        total=job.pictures(), initial=finished, unit=" pictures", disable=quiet or not missing, smoothing=0.05
    ) as bar:
        meter = _Meter(bar)
        if workers == 1:
            for number in missing:
                job.build(number, meter.add)
        elif missing:
            _build_parallel(job, missing, workers, meter)


class _Meter:
    """Shows pictures/s (by tqdm) and MB/s."""

    def __init__(self, bar: tqdm) -> None:
        self.bar, self.bytes, self.started = bar, 0, time.monotonic()

    def add(self, pictures: int, size: int) -> None:
        self.bytes += size
        rate = self.bytes / 1e6 / max(time.monotonic() - self.started, 1e-3)
        self.bar.set_postfix_str(f"{rate:.1f} MB/s", refresh=False)
        self.bar.update(pictures)


class _StoppedError(Exception):
    """The main process asked a worker to give up."""


def _build_parallel(job: Job, missing: list[int], workers: int, meter: _Meter) -> None:
    context = multiprocessing.get_context("spawn")
    pictures, size, stop = context.Value("q", 0), context.Value("q", 0), context.Event()
    todo: Iterator[int] = iter(missing)
    shown = (0, 0)
    with ProcessPoolExecutor(workers, context, _start_worker, (job, pictures, size, stop)) as pool:
        # two tasks a worker are in flight: none waits, and an error stops the rest soon
        running: set[Future[None]] = {pool.submit(_build_one, n) for n in islice(todo, 2 * workers)}
        try:
            while running:
                done, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                running |= {pool.submit(_build_one, n) for n in islice(todo, len(done))}
                now = (pictures.value, size.value)
                meter.add(now[0] - shown[0], now[1] - shown[1])
                shown = now
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


_worker: dict[str, Any] = {}  # what _start_worker was given, in a worker process


def _start_worker(job: Job, pictures: Any, size: Any, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the main process, which tells the workers
    keep_torch_out()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker.update(job=job, pictures=pictures, size=size, stop=stop)


def _end_with_parent() -> None:
    """A killed main process must not leave workers behind that go on writing."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _build_one(number: int) -> None:
    waiting = [0, 0]

    def flush() -> None:
        for counter, value in zip((_worker["pictures"], _worker["size"]), waiting, strict=True):
            with counter.get_lock():
                counter.value += value
        waiting[:] = [0, 0]
        if _worker["stop"].is_set():
            raise _StoppedError

    def tick(pictures: int, size: int) -> None:
        waiting[0] += pictures
        waiting[1] += size
        if waiting[0] >= _REPORT_EVERY:
            flush()

    _worker["job"].build(number, tick)
    flush()


def _complete(job: Job, about: dict[str, Any], started: float) -> Summary:
    """Write samples.npy, rejected.jsonl and, last, dataset.json, if every shard is there."""
    out = job.out
    records = [job.done(n) for n in range(len(job))]
    present = [r for r in records if r is not None]
    shards = [r["shard"] for r in present]
    rejected = sorted([*about["rejected"], *(entry for r in present for entry in r["rejected"])])
    pictures = sum(shard["samples"] for shard in shards)
    info = {
        "format_version": FORMAT_VERSION,
        "source": about["recipe"]["source"],
        "source_fingerprint": about["fingerprint"],
        "split": about["recipe"]["split"],
        "seed": about["recipe"]["seed"],
        "recipe": {k: v for k, v in about["recipe"].items() if k != "source"},
        "num_samples": pictures,
        "num_rejected": len(rejected),
        "rejected": dict(sorted(Counter(reason for _, reason in rejected).items())),
        "classes": about["classes"],
    }
    if len(present) < len(job):
        assert about["parts"], "a run without --part builds every shard"
        return _summary(out, {**info, "shards": shards}, started, complete=False)
    if pictures == 0:
        raise UserError(f"none of the {len(rejected)} pictures can be used: {info['rejected']}")
    info["has_labels"] = _write_samples(job, records, pictures)
    info["samples_sha256"] = file_sha256(out / SAMPLES_FILE)
    info["shards"] = [shard for shard in shards if shard["samples"]]
    with atomic_file(out / REJECTED_FILE) as file:
        file.writelines(json.dumps({"name": n, "reason": r}).encode() + b"\n" for n, r in rejected)
    write_json(out / DATASET_FILE, info)
    shutil.rmtree(out / PARTIAL_DIR)
    return _summary(out, info, started)


def _write_samples(job: Job, records: list[dict[str, Any] | None], pictures: int) -> bool:
    """Join the shards' rows into samples.npy, one shard in memory at a time. True if every sample has a label."""
    shard, labelled = 0, True
    with atomic_file(job.out / SAMPLES_FILE) as file:
        header = {"descr": np.lib.format.dtype_to_descr(SAMPLE_DTYPE), "fortran_order": False, "shape": (pictures,)}
        np.lib.format.write_array_header_2_0(file, header)
        for number, record in enumerate(records):
            assert record is not None
            if record["shard"]["samples"]:
                rows = job.rows(number)
                rows["shard"] = shard
                labelled = labelled and bool((rows["label"] >= 0).all())
                file.write(rows.tobytes())
                shard += 1
    return labelled


def _summary(
    out: Path, info: dict[str, Any], started: float, complete: bool = True, already_there: bool = False
) -> Summary:
    return Summary(
        out=out,
        complete=complete,
        shards=len(info["shards"]),
        pictures=info["num_samples"],
        rejected=info["rejected"],
        bytes=sum(shard["bytes"] for shard in info["shards"]),
        classes=len(info["classes"]),
        seconds=time.monotonic() - started,
        already_there=already_there,
    )
