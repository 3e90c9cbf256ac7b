"""Make a dataset from a source of images: in parallel, verified, atomic, resumable.

    make_dataset("~/photos", "data/photos", ShardingOptions(samples_per_shard=1000))

Unfinished work is kept in OUT/.partial: the listing of the source, the order, and a marker file per finished shard.
After an interruption the same call builds only the shards without a marker. dataset.json is written last; until then
OUT is not a dataset.
"""

from __future__ import annotations

import json
import re
import shutil
import stat
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np

from pipeline.common.errors import UserError
from pipeline.common.files import (
    atomic_file,
    disk_errors,
    read_regular,
    real_folder,
    write_json,
)
from pipeline.common.locks import FolderLock, exclusive_lock, make_exclusive
from pipeline.common.secrets import conceal, reveal
from pipeline.common.system import dali_installed
from pipeline.dataset.format import (
    DATASET_FILE,
    PARTIAL_DIR,
    REENCODED_FILE,
    REJECTED_FILE,
    SAMPLES_FILE,
    read_dataset_file,
)
from pipeline.dataset.names import NAME_STARTS_FILE, NAMES_FILE
from pipeline.sharding.finalize import complete
from pipeline.sharding.hold_out import held_out, thumbnails
from pipeline.sharding.index_tars import (
    IndexJob,
    check_options,
    expand_braces,
    labels_from,
    listing_fingerprint,
    open_tars,
    refuse_wds_options,
)
from pipeline.sharding.options import ShardingOptions
from pipeline.sharding.remote_tars import RemoteIndexJob, is_remote, open_remote_tars
from pipeline.sharding.restore import lost_shards, restore_shards
from pipeline.sharding.workers import build_missing
from pipeline.sharding.write_shard import Job, WriteJob
from pipeline.sources.labels import dataset_classes
from pipeline.sources.listing import Listing
from pipeline.sources.open_source import open_source, source_title
from pipeline.sources.readers import WDS

HELD_OUT_SUFFIX = "-val"  # behind OUT: the dataset that --hold-out makes beside it
LOCK_FILE = "lock"  # in .partial
_SHARD_GLOB = "shard-" + "[0-9]" * 6


@dataclass(frozen=True)
class Summary:
    """Result of one call of make_dataset."""

    out: Path
    missing: int  # shards that other parts still have to build; 0 = complete
    shards: int
    images: int
    rejected: dict[str, int]  # reason -> count
    reencoded: dict[str, int]  # reason -> count of images whose pixels, not bytes, were kept
    bytes: int  # of all tars
    classes: int
    class_names: tuple[str, ...]
    labels_from: str | None  # what the classes are from, for people: "folders"; None: unknown, or no classes
    labelled: bool  # whether every image has a label
    unlabelled: int  # images without a label, where that is recorded
    notes: tuple[str, ...]  # choices made while the source was listed, one line each
    seconds: float
    already_there: bool = False  # the dataset was complete before the call, but for ``restored``
    restored: int = 0  # lost shards that were written again
    held_out: Summary | None = None  # of the second dataset, of --hold-out


def make_dataset(
    source: str,
    out: str | Path,
    options: ShardingOptions | None = None,
    *,
    quiet: bool = False,
    in_process: bool = False,
) -> Summary:
    """Write the images of SOURCE as a dataset into folder ``out``, or continue an interrupted call.

    The bytes written depend on the images, the seed and the options, not on the number of workers or interruptions.
    ``quiet`` turns the progress bar off; ``in_process`` builds the shards in this process. Raises UserError for
    everything that a user can mend: a missing source, a full disk, an interrupted run with other options, no usable
    image, ...
    """
    options = options or ShardingOptions()
    out = Path(out)
    if options.hold_out is None:
        return _make_dataset(source, out, options, quiet, in_process)
    if source.startswith(WDS):
        raise UserError("--hold-out does not go with wds:, since tars are only indexed: leave it out")
    val_out = out.with_name(f"{out.name}{HELD_OUT_SUFFIX}")
    for folder in (out, val_out):  # both, before the work of the first
        _check_place(source, folder)
    if options.overwrite:
        for folder in (out, val_out):
            if folder.exists():
                with (
                    disk_errors(f"deleting the dataset in {folder}"),
                    exclusive_lock(real_folder(folder / PARTIAL_DIR) / LOCK_FILE, shared=False),
                ):
                    remove_dataset(folder)
                    _forget_beginning(folder)
    sides: tuple[Literal["train", "val"], ...] = ("train", "val")
    train, val = (replace(options, side=side, split=options.split or side, overwrite=False) for side in sides)
    made = _make_dataset(source, out, train, quiet, in_process)
    return replace(made, held_out=_make_dataset(source, val_out, val, quiet, in_process))


def _make_dataset(source: str, out: Path, options: ShardingOptions, quiet: bool, in_process: bool) -> Summary:
    started = time.monotonic()
    with disk_errors(f"making the dataset in {out}"):
        _check_place(source, out)
        if (out / DATASET_FILE).exists() and not options.overwrite:
            return _already_complete(source, out, options, started, quiet, in_process)
        with disk_errors(f"making {out}", f"OUT {out} cannot be made", "name another folder"):
            out.mkdir(parents=True, exist_ok=True)
            real_folder(out / PARTIAL_DIR)
        with exclusive_lock(out / PARTIAL_DIR / LOCK_FILE, shared=options.part is not None) as lock:
            if options.overwrite:
                remove_dataset(out)
            info = _make(source, out, options, lock, quiet, in_process)
            if info is None:
                return _already_complete(source, out, options, started, quiet, in_process)
            return _summary(out, info, started)


def _make(
    source: str, out: Path, options: ShardingOptions, lock: FolderLock, quiet: bool, in_process: bool
) -> dict[str, Any] | None:
    """The contents of dataset.json, a partial summary while parts are missing, or None if another part completed it."""
    if options.part is None:
        for left_over in (out / PARTIAL_DIR).rglob("*.tmp-*"):
            left_over.unlink()
    try:
        job, about = _prepare(source, out, options, quiet, in_process)
    except UserError:
        if options.part is None:
            _forget_beginning(out)
        raise
    build_missing(job, options, quiet, in_process, check=lock.check)
    if options.part is not None:  # parts run side by side; only one may complete the dataset
        make_exclusive(lock.file)
        if (out / DATASET_FILE).exists():
            return None
    info = complete(job, about)
    assert info is not None or options.part is not None, "a run without --part builds every shard"
    return info or _so_far(job, about)


def _so_far(job: Job, about: dict[str, Any]) -> dict[str, Any]:
    shards = [record["shard"] for record in map(job.done, range(len(job))) if record is not None]
    images = sum(shard["samples"] for shard in shards)
    return {
        "num_samples": images,
        "shards": shards,
        "classes": about["classes"],
        "labels_from": about.get("labels_from"),
        "notes": about.get("notes", []),
        "rejected": {},
        "missing": len(job) - len(shards),
    }


def _forget_beginning(out: Path) -> None:
    """Remove .partial after a failed listing, unless it holds an unpacked copy of the source or an earlier run."""
    partial = out / PARTIAL_DIR
    if not (partial / "job.json").exists() and not (partial / "spool.json").exists():
        shutil.rmtree(partial)
        if not any(out.iterdir()):
            out.rmdir()


def remove_dataset(out: Path) -> None:
    """Delete a complete or unfinished dataset from ``out``: only files that make_dataset wrote, dataset.json first.

    The lock, which the caller holds, and tars that were only indexed are kept. Raises UserError if dataset.json cannot
    be read to decide that.
    """
    try:
        title, names = _recorded(out)
    except (OSError, ValueError, KeyError, TypeError):
        _forget_beginning(out)
        raise UserError(
            f"{out / DATASET_FILE} is damaged: so the files of the dataset are unknown; delete {out} yourself"
        ) from None
    job_file = out / PARTIAL_DIR / "job.json"
    if title is not None:
        # Killed from here on, the same command finds by this what is left
        write_json(job_file, {"recipe": {"source": title}, "fingerprint": ""})
        sidecars = (DATASET_FILE, SAMPLES_FILE, REJECTED_FILE, REENCODED_FILE, NAMES_FILE, NAME_STARTS_FILE)
        for name in (*sidecars, *names):
            (out / name).unlink(missing_ok=True)
    for entry in (out / PARTIAL_DIR).iterdir():
        if entry.name in (LOCK_FILE, job_file.name):
            continue
        if stat.S_ISDIR(entry.lstat().st_mode):
            shutil.rmtree(entry)
        else:
            entry.unlink()
    job_file.unlink(missing_ok=True)


def _recorded(out: Path) -> tuple[str | None, list[str]]:
    """(title of the source, names of the tars and indexes that we wrote), from dataset.json or the interrupted run."""
    if (out / DATASET_FILE).exists():
        info = json.loads(read_regular(out / DATASET_FILE))
        title, shards = info["source"], info["shards"]
        names = [shard["index"] for shard in shards]
        names += [] if title.startswith(WDS) else [shard["name"] for shard in shards]
        if any(Path(name).name != name for name in names):
            raise ValueError("the files of a dataset are in its own folder")
        return title, names
    job_file = out / PARTIAL_DIR / "job.json"
    if not job_file.exists():  # nothing is there, or what was begun has not left .partial yet
        return None, []
    title = json.loads(read_regular(job_file))["recipe"]["source"]
    patterns = (
        ("index-" + "[0-9]" * 6 + ".idx",) if title.startswith(WDS) else (f"{_SHARD_GLOB}.tar", f"{_SHARD_GLOB}.idx")
    )
    return title, [file.name for pattern in patterns for file in out.glob(pattern)]


def _check_place(source: str, out: Path) -> None:
    if (out / PARTIAL_DIR).is_symlink():
        raise UserError(f"{out / PARTIAL_DIR} is a link to another folder: remove it, then try again")
    if out.exists() and not out.is_dir():
        raise UserError(f"OUT {out} is a file: give a folder")
    folder = Path(source)
    if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"OUT {out} lies inside SOURCE {source}: its shards would become part of the source; choose another folder"
        )
    ours = (out / DATASET_FILE).exists() or (out / PARTIAL_DIR).exists()
    patterns = [SAMPLES_FILE] if source.startswith(WDS) else [SAMPLES_FILE, f"{_SHARD_GLOB}.tar", f"{_SHARD_GLOB}.idx"]
    if not ours and out.is_dir() and any(file for pattern in patterns for file in out.glob(pattern)):
        raise UserError(f"{out} has shards but no {DATASET_FILE}: choose an empty folder, or delete them yourself")


def _already_complete(
    source: str, out: Path, options: ShardingOptions, started: float, quiet: bool, in_process: bool
) -> Summary:
    """The summary of a complete dataset of ours, whose lost shards are written again."""
    own = not source.startswith(WDS)
    info = read_dataset_file(out, check_files=not own and not is_remote(source.removeprefix(WDS)))
    wanted = {"source": source_title(source), **options.recipe()}
    there = {"source": info["source"], **info["recipe"]}
    if differences := _differences(there, wanted):
        raise UserError(
            f"{out} holds a complete dataset made with other options ({differences}): choose another folder, "
            "or say --overwrite to replace it"
        )
    lost = lost_shards(out, info) if own else {}
    if lost:
        _restore(source, out, options, info, quiet, in_process)
    elif (out / PARTIAL_DIR).exists():  # the last run ended between its last two actions
        with exclusive_lock(real_folder(out / PARTIAL_DIR) / LOCK_FILE, shared=False):
            shutil.rmtree(out / PARTIAL_DIR)
    return _summary(out, info, started, already_there=True, restored=len(lost))


def _restore(
    source: str, out: Path, options: ShardingOptions, info: dict[str, Any], quiet: bool, in_process: bool
) -> None:
    with exclusive_lock(real_folder(out / PARTIAL_DIR) / LOCK_FILE, shared=False) as lock:
        job, about = _prepare(source, out, options, quiet, in_process)
        assert isinstance(job, WriteJob)
        restore_shards(job, about["fingerprint"], info, lost_shards(out, info), quiet, in_process, lock.check)
        shutil.rmtree(out / PARTIAL_DIR)


def _differences(there: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The flags whose values differ, for people; an option that ``there`` does not know had its default."""
    there = {**ShardingOptions().recipe(), **there}
    names = [n for n in {**there, **wanted} if there.get(n) != wanted.get(n)]
    flags = {n: "SOURCE" if n == "source" else "--" + n.replace("_", "-") for n in names}
    return "; ".join(f"{flags[n]} was {there.get(n)}, now {wanted.get(n)}" for n in names)


def _prepare(
    source: str, out: Path, options: ShardingOptions, quiet: bool, in_process: bool
) -> tuple[Job, dict[str, Any]]:
    """List the source, compare it with an interrupted run, and write the plan of the job to OUT/.partial."""
    job_file = out / PARTIAL_DIR / "job.json"
    earlier = json.loads(job_file.read_text()) if job_file.exists() else None
    about: dict[str, Any] = {
        "recipe": {"source": source_title(source), **options.recipe()},
        "compared": ["torchvision", "dali"] if dali_installed() else ["torchvision"],
    }
    if earlier is not None and (differences := _differences(earlier["recipe"], about["recipe"])):
        raise UserError(
            f"{out} has an interrupted run with other options ({differences}): repeat its options to go on with it, "
            "or say --overwrite to start again"
        )
    job: Job
    if source.startswith(WDS):
        job, sizes = _index_job(source.removeprefix(WDS), out, options)
        known = [] if options.classes_from is None else list(dataset_classes(options.classes_from))
        about.update(
            fingerprint=listing_fingerprint(job.tars, sizes),
            classes=known,
            rejected=[],
            labels_from=labels_from(options),
        )
        if isinstance(job, RemoteIndexJob):
            about["notes"] = [
                f"the tars stay at {job.folder}: copy the files of OUT beside them, dataset.json last, and train with "
                "--data of that URL"
            ]
    else:
        refuse_wds_options(options)
        found = open_source(
            source,
            out / PARTIAL_DIR,
            subtree=options.subtree,
            labels=options.labels,
            label_column=options.label_column,
            image_column=options.image_column,
            split=options.split,
            classes_from=options.classes_from,
            seed=options.seed,
            quiet=quiet,
        )
        about.update(fingerprint=found.listing.fingerprint(), classes=list(found.listing.classes))
        about["rejected"] = [[r.name, r.reason] for r in found.listing.rejected]
        about.update(labels_from=found.labels_from, notes=list(found.notes))
        job = WriteJob(out, found.reader, options)
        if earlier is None:
            _lay_out(found.listing, job, quiet, in_process)
    if earlier is None:
        write_json(job_file, about)
    elif earlier["fingerprint"] != about["fingerprint"]:
        raise UserError(
            f"{source} has changed since the interrupted run in {out} began (images were added, removed, renamed or "
            "have another length): restore it to go on, or say --overwrite to start again"
        )
    return job, about


def _index_job(pattern: str, out: Path, options: ShardingOptions) -> tuple[IndexJob, list[int]]:
    """(the job that indexes the tars of wds:PATTERN, their bytes)."""
    check_options(options)
    if not is_remote(pattern):
        tars = open_tars(pattern)
        return IndexJob(out, tars, options), [tar.stat().st_size for tar in tars]
    if re.search(r"[*\[]", urlsplit(reveal(pattern)).path):
        raise UserError(
            f"wds:{conceal(pattern)}: * and [ are not looked up behind a URL; write numbers as {{000..146}}"
        )
    job = open_remote_tars(expand_braces(pattern), out, options)
    return job, job.sizes


def _lay_out(listing: Listing, job: WriteJob, quiet: bool, in_process: bool) -> None:
    """Save the listing and the order for the workers; of --hold-out only the images of this side.

    The order sorts raw 64-bit numbers: numpy guarantees the raw stream of PCG64, but not Generator.permutation.
    """
    options, partial = job.options, job.out / PARTIAL_DIR
    listing.save(partial / "listing")
    order = np.argsort(np.random.PCG64(options.seed).random_raw(len(listing)), kind="stable")[: options.limit]
    if options.hold_out is not None:
        held = _held_out(listing, order, job, quiet, in_process)
        order = order[np.isin(order, held) == (options.side == "val")]
    with atomic_file(partial / "order.npy") as file:
        np.save(file, order)


def _held_out(listing: Listing, order: np.ndarray, job: WriteJob, quiet: bool, in_process: bool) -> np.ndarray:
    """Int64[n]: the images that --hold-out holds out; comparing them all once serves both datasets."""
    options, chosen = job.options, np.sort(order)
    assert options.hold_out is not None
    name = f"held-out-{listing.fingerprint()[:16]}.npy"
    known = job.out / PARTIAL_DIR / name
    if options.side == "val" and known.exists():
        return np.load(known, allow_pickle=False)
    thumbs = thumbnails(job, chosen, quiet, in_process)
    held = chosen[held_out(thumbs, listing.labels[chosen], options.hold_out, options.seed)]
    if options.side == "train":
        other = job.out.with_name(f"{job.out.name}{HELD_OUT_SUFFIX}")
        other.mkdir(parents=True, exist_ok=True)
        with atomic_file(real_folder(other / PARTIAL_DIR) / name) as file:
            np.save(file, held)
    return held


def _summary(
    out: Path, info: dict[str, Any], started: float, already_there: bool = False, restored: int = 0
) -> Summary:
    return Summary(
        out=out,
        missing=info.get("missing", 0),
        shards=len(info["shards"]),
        images=info["num_samples"],
        rejected=info["rejected"],
        reencoded=info.get("reencoded", {}),
        bytes=sum(shard["bytes"] for shard in info["shards"]),
        classes=len(info["classes"]),
        class_names=tuple(info["classes"]),
        labels_from=info.get("labels_from"),
        labelled=info.get("has_labels", True),  # unknown while parts are missing
        unlabelled=info["num_samples"] - info.get("num_labelled", info["num_samples"]),
        notes=tuple(info.get("notes", ())),
        seconds=time.monotonic() - started,
        already_there=already_there,
        restored=restored,
    )
