"""Make a dataset from a source of images: in parallel, verified, atomic, resumable.

    make_dataset("~/photos", "data/photos", ShardingOptions(samples_per_shard=1000))

Unfinished work is kept in OUT/.partial: the listing of the source, the order, and a marker file per finished shard.
After an interruption the same call builds only the shards without a marker. dataset.json is written last; until then
OUT is not a dataset.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.common.engine import EngineConfig
from pipeline.common.errors import UserError
from pipeline.common.files import atomic_file, disk_errors
from pipeline.common.locations import WDS, Url, is_url, location
from pipeline.common.secrets import conceal, reveal
from pipeline.common.system import dali_installed
from pipeline.dataset.format import (
    DATASET_FILE,
    PARTIAL_DIR,
    REENCODED_FILE,
    REJECTED_FILE,
    SAMPLES_FILE,
    parse_dataset_file,
    read_dataset_file,
)
from pipeline.dataset.names import NAME_STARTS_FILE, NAMES_FILE
from pipeline.dataset.out_folder import Lock, OutFolder, RemoteOut, open_out, write_json
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
from pipeline.sharding.remote_tars import RemoteIndexJob, is_remote, open_remote_tars, refuse_globs
from pipeline.sharding.restore import lost_shards, restore_shards
from pipeline.sharding.workers import build_missing
from pipeline.sharding.write_shard import Job, WriteJob
from pipeline.sources.labels import dataset_classes
from pipeline.sources.listing import Listing
from pipeline.sources.open_source import open_source, source_title
from pipeline.sources.readers import SPOOL_FILE, ContainerReader, Reader, Spool
from pipeline.sources.remote_path import RemotePath, SourcePath

HELD_OUT_SUFFIX = "-val"  # behind OUT: the dataset that --hold-out makes beside it
MANY_DRAWS = 50_000_000  # images, whose draws take 0.8 GB
_JOB_FILE = f"{PARTIAL_DIR}/job.json"


@dataclass(frozen=True)
class Summary:
    """Result of one call of make_dataset."""

    out: Path | Url
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
    out: str | Path | Url,
    options: ShardingOptions | None = None,
    *,
    quiet: bool = False,
    in_process: bool = False,
    engine: EngineConfig | None = None,
) -> Summary:
    """Write the images of SOURCE as a dataset into ``out``, a folder or a bucket's, or continue an interrupted call.

    The bytes written depend on the images, the seed and the options, not on the number of workers or interruptions.
    ``quiet`` turns the progress bar off; ``in_process`` builds the shards in this process. ``engine``: where they are
    built, by default in processes of this machine; the bytes are the same. Raises UserError for
    everything that a user can mend: a missing source, a full disk, an interrupted run with other options, no usable
    image, ...
    """
    options, how = options or ShardingOptions(), _How(quiet, in_process, engine or EngineConfig())
    place = location(out) if isinstance(out, str) else out
    if how.engine.engine == "ray":  # nodes have working folders of their own
        place = place.absolute() if isinstance(place, Path) else place
        source = str(Path(source).absolute()) if not is_url(source) and Path(source).exists() else source
    if options.hold_out is None:
        return _make_dataset(source, place, options, how)
    if source.startswith(WDS):
        raise UserError("--hold-out does not go with wds:, since tars are only indexed: leave it out")
    val_place = _beside(place)
    stores = (open_out(place), open_out(val_place))
    for store in stores:  # both, before the work of the first
        _check_place(source, store)
    if options.overwrite:
        for store in stores:
            if store.exists():
                with disk_errors(f"deleting the dataset in {store.place}"), store.lock(None):
                    remove_dataset(store)
                    _forget_beginning(store)
    sides: tuple[Literal["train", "val"], ...] = ("train", "val")
    train, val = (replace(options, side=side, split=options.split or side, overwrite=False) for side in sides)
    made = _make_dataset(source, place, train, how)
    return replace(made, held_out=_make_dataset(source, val_place, val, how))


def _beside(place: Path | Url) -> Path | Url:
    """The folder of the images that --hold-out holds out."""
    if isinstance(place, Url):
        return Url(f"{place.secret.rstrip('/')}{HELD_OUT_SUFFIX}")
    return place.with_name(f"{place.name}{HELD_OUT_SUFFIX}")


@dataclass(frozen=True)
class _How:
    """What a call shows, and where it works."""

    quiet: bool
    in_process: bool
    engine: EngineConfig


def _make_dataset(source: str, place: Path | Url, options: ShardingOptions, how: _How) -> Summary:
    store, started = open_out(place), time.monotonic()
    with disk_errors(f"making the dataset in {place}"), _work_folder(place) as work:
        call = _Call(source, store, work, options, how)
        _check_place(source, store)
        if store.has(DATASET_FILE) and not options.overwrite:
            return _already_complete(call, started)
        with store.lock(options.part) as lock:
            if options.overwrite:
                remove_dataset(store)
            info = _make(call, lock)
            if info is None:
                return _already_complete(call, started)
            return _summary(place, info, started)


@dataclass(frozen=True)
class _Call:
    """The arguments of make_dataset."""

    source: str
    store: OutFolder
    work: Path  # the listing and the order, and what has no random access; of a folder on a disk, its PARTIAL_DIR
    options: ShardingOptions
    how: _How

    @property
    def place(self) -> Path | Url:
        """OUT."""
        return self.store.place

    @property
    def remote(self) -> RemoteOut | None:
        """OUT if it is a bucket's folder."""
        return self.store if isinstance(self.store, RemoteOut) else None

    @property
    def folder(self) -> Path:
        """OUT, or for a bucket the folder of this machine that stands for it during the work."""
        return self.place if isinstance(self.place, Path) else self.work


@contextmanager
def _work_folder(place: Path | Url) -> Iterator[Path]:
    if isinstance(place, Path):
        yield place / PARTIAL_DIR
        return
    with tempfile.TemporaryDirectory(prefix="siamstream-") as folder:
        yield Path(folder)


def _make(call: _Call, lock: Lock) -> dict[str, Any] | None:
    """The contents of dataset.json, a partial summary while parts are missing, or None if another part completed it."""
    try:
        job, about = _prepare(call)
    except UserError:
        if call.options.part is None:
            _forget_beginning(call.store)
        raise
    build_missing(job, call.options, call.how.quiet, call.how.in_process, engine=call.how.engine, check=lock.check)
    lock.check()
    if call.options.part is not None:  # parts run side by side; only one may complete the dataset
        lock.make_exclusive()
        if call.store.has(DATASET_FILE):
            return None
    info = complete(job, about)
    assert info is not None or call.options.part is not None, "a run without --part builds every shard"
    return info or _so_far(job, about)


def _so_far(job: Job, about: dict[str, Any]) -> dict[str, Any]:
    shards = [record["shard"] for record in job.records(range(len(job))) if record is not None]
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


def _forget_beginning(store: OutFolder) -> None:
    """Remove .partial after a failed listing, unless it holds an unpacked copy of the source or an earlier run."""
    if not store.has(_JOB_FILE) and not store.has(f"{PARTIAL_DIR}/{SPOOL_FILE}"):
        store.remove_partial()


def remove_dataset(store: OutFolder) -> None:
    """Delete a complete or unfinished dataset: only files that make_dataset wrote, dataset.json first.

    The lock, which the caller holds, and tars that were only indexed are kept. Raises UserError if dataset.json cannot
    be read to decide that.
    """
    try:
        title, names = _recorded(store)
    except (OSError, ValueError, KeyError, TypeError):
        _forget_beginning(store)
        raise UserError(
            f"{DATASET_FILE} of {store.place} is damaged: so the files of the dataset are unknown; delete "
            f"{store.place} yourself"
        ) from None
    if title is not None:
        # Killed from here on, the same command finds by this what is left
        write_json(store, _JOB_FILE, {"recipe": {"source": title}, "fingerprint": ""})
        store.remove([DATASET_FILE])
        store.remove([SAMPLES_FILE, REJECTED_FILE, REENCODED_FILE, NAMES_FILE, NAME_STARTS_FILE, *names])
    store.clear_partial(keep=_JOB_FILE)
    store.remove([_JOB_FILE])


def _recorded(store: OutFolder) -> tuple[str | None, list[str]]:
    """(title of the source, names of the tars and indexes that we wrote), from dataset.json or the interrupted run."""
    if store.has(DATASET_FILE):
        info = json.loads(store.read(DATASET_FILE) or b"")
        title, shards = info["source"], info["shards"]
        names = [shard["index"] for shard in shards]
        names += [] if title.startswith(WDS) else [shard["name"] for shard in shards]
        if any(Path(name).name != name for name in names):
            raise ValueError("the files of a dataset are in its own folder")
        return title, names
    job_file = store.read(_JOB_FILE)
    if job_file is None:  # nothing is there, or what was begun has not left .partial yet
        return None, []
    title = json.loads(job_file)["recipe"]["source"]
    pattern = r"index-\d{6}\.idx" if title.startswith(WDS) else r"shard-\d{6,}\.(tar|idx)"
    return title, [name for name in store.sizes() if re.fullmatch(pattern, name)]


def _check_place(source: str, store: OutFolder) -> None:
    out = store.place
    if isinstance(out, Path):
        if (out / PARTIAL_DIR).is_symlink():
            raise UserError(f"{out / PARTIAL_DIR} is a link to another folder: remove it, then try again")
        if out.exists() and not out.is_dir():
            raise UserError(f"OUT {out} is a file: give a folder")
    if _lies_inside(out, source):
        raise UserError(
            f"OUT {out} lies inside SOURCE {conceal(source)}: its shards would become part of the source; choose "
            "another folder"
        )
    if store.has(DATASET_FILE) or store.has(PARTIAL_DIR):
        return
    ours = re.escape(SAMPLES_FILE) + ("" if source.startswith(WDS) else r"|shard-\d{6}\.(tar|idx)")
    if any(re.fullmatch(ours, name) for name in store.sizes()):
        raise UserError(f"{out} has shards but no {DATASET_FILE}: choose an empty folder, or delete them yourself")


def _lies_inside(out: Path | Url, source: str) -> bool:
    if source.startswith(WDS):
        return False
    if isinstance(out, Path):
        folder = Path(source)
        return folder.is_dir() and out.resolve().is_relative_to(folder.resolve())
    return is_url(source) and f"{out.secret.rstrip('/')}/".startswith(f"{reveal(source).rstrip('/')}/")


def _already_complete(call: _Call, started: float) -> Summary:
    """The summary of a complete dataset of ours, whose lost shards are written again."""
    source, out, options = call.source, call.place, call.options
    own = not source.startswith(WDS)
    if isinstance(out, Path):
        info = read_dataset_file(out, check_files=not own and not is_remote(source.removeprefix(WDS)))
    else:
        info = parse_dataset_file(call.store.read(DATASET_FILE) or b"", f"{DATASET_FILE} of {out}")
    wanted = {"source": source_title(source), **options.recipe()}
    there = {"source": info["source"], **info["recipe"]}
    if differences := _differences(there, wanted):
        raise UserError(
            f"{out} holds a complete dataset made with other options ({differences}): choose another folder, "
            "or say --overwrite to replace it"
        )
    lost = lost_shards(call.store, info) if own else {}
    if lost:
        _restore(call, info)
    elif call.store.has(PARTIAL_DIR):  # the last run ended between its last two actions
        with call.store.lock(None):
            call.store.remove_partial()
    return _summary(out, info, started, already_there=True, restored=len(lost))


def _restore(call: _Call, info: dict[str, Any]) -> None:
    with call.store.lock(None) as lock:
        job, about = _prepare(call)
        assert isinstance(job, WriteJob)
        lost = lost_shards(call.store, info)
        restore_shards(job, about["fingerprint"], info, lost, call.how.quiet, call.how.in_process, lock.check)
        call.store.remove_partial()


def _differences(there: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The flags whose values differ, for people; an option that ``there`` does not know had its default."""
    there = {**ShardingOptions().recipe(), **there}
    names = [n for n in {**there, **wanted} if there.get(n) != wanted.get(n)]
    flags = {n: "SOURCE" if n == "source" else "--" + n.replace("_", "-") for n in names}
    return "; ".join(f"{flags[n]} was {there.get(n)}, now {wanted.get(n)}" for n in names)


def _prepare(call: _Call) -> tuple[Job, dict[str, Any]]:
    """List the source, compare it with an interrupted run, and write the plan of the job to OUT/.partial."""
    source, out, options = call.source, call.place, call.options
    job_file = call.store.read(_JOB_FILE)
    earlier = None if job_file is None else json.loads(job_file)
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
    if options.index_only and not source.startswith(WDS):
        raise UserError(
            f"--index-only: {source} is to be copied into shards; only tars of WebDataset samples are read where they "
            f"lie: SOURCE {WDS}PATTERN"
        )
    if source.startswith(WDS):
        if options.channels is not None:
            raise UserError(f"--channels {options.channels} takes a folder of images, not {WDS} tars")
        if not isinstance(out, Path):
            raise UserError(
                f"OUT {out}: the index of {WDS} tars is written to a folder of this machine; name one, then copy its "
                "files beside the tars, dataset.json last"
            )
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
                f"the tars stay at {job.folder}: train with --data OUT, or copy its files beside them, dataset.json "
                "last, and train with --data of that URL"
            ]
            if str(job.folder) == job.folder.secret:
                about["tars_at"] = str(job.folder)
            else:
                about["notes"] = [
                    f"the tars stay at {job.folder}, whose password or signature is not recorded: copy the files of "
                    "OUT beside them, dataset.json last, and train with --data of that URL"
                ]
    else:
        refuse_wds_options(options)
        found = open_source(
            source,
            Spool(call.work, call.remote, f"copy-{(options.part or '0/1').replace('/', '-of-')}-"),
            subtree=options.subtree,
            labels=options.labels,
            label_column=options.label_column,
            image_column=options.image_column,
            split=options.split,
            classes_from=options.classes_from,
            seed=options.seed,
            quiet=call.how.quiet,
            channels=options.channels is not None,
        )
        about.update(fingerprint=found.listing.fingerprint(), classes=list(found.listing.classes))
        about["rejected"] = [[r.name, r.reason] for r in found.listing.rejected]
        about.update(labels_from=found.labels_from, notes=list(found.notes))
        job = WriteJob(call.folder, _shared(found.reader, call), options)
        job.work, job.remote = call.work, call.remote
        if earlier is None or call.remote is not None:
            _lay_out(found.listing, job, call)
    if earlier is None:
        write_json(call.store, _JOB_FILE, about)
    elif earlier["fingerprint"] != about["fingerprint"]:
        raise UserError(
            f"{conceal(source)} has changed since the interrupted run in {out} began (images were added, removed, "
            "renamed or have another length): restore it to go on, or say --overwrite to start again"
        )
    return job, about


def _shared(reader: Reader, call: _Call) -> Reader:
    """The reader for all workers: what was unpacked or copied on this machine goes to the bucket for other machines."""
    if call.remote is None or call.how.engine.engine == "local" or not isinstance(reader, ContainerReader):
        return reader
    paths: list[SourcePath] = []
    for path in reader.paths:
        if isinstance(path, Path) and path.is_relative_to(call.work):
            name = f"{PARTIAL_DIR}/{path.name}"
            with open(path, "rb") as file, call.remote.writer(name) as upload:
                shutil.copyfileobj(file, upload, 1 << 20)
            assert isinstance(call.place, Url)
            path = RemotePath(name, call.place)
        paths.append(path)
    return replace(reader, paths=tuple(paths))


def _index_job(pattern: str, out: Path, options: ShardingOptions) -> tuple[IndexJob, list[int]]:
    """(the job that indexes the tars of wds:PATTERN, their bytes)."""
    check_options(options)
    if not is_remote(pattern):
        tars = open_tars(pattern)
        return IndexJob(out, tars, options), [tar.stat().st_size for tar in tars]
    refuse_globs(pattern)
    job = open_remote_tars(expand_braces(pattern), out, options)
    return job, job.sizes


def _lay_out(listing: Listing, job: WriteJob, call: _Call) -> None:
    """Save the listing and the order for the workers; of --hold-out only the images of this side.

    The order sorts raw 64-bit numbers: numpy guarantees the raw stream of PCG64, but not Generator.permutation.
    """
    options = call.options
    listing.save(call.work / "listing")
    if options.shuffle == "permutation":
        return  # each shard's part is computed
    if len(listing) > MANY_DRAWS:
        print(f"note: {len(listing):,} images: --shuffle permutation would sort nothing in memory", file=sys.stderr)
    order = np.argsort(np.random.PCG64(options.seed).random_raw(len(listing)), kind="stable")[: options.limit]
    if options.hold_out is not None:
        held = _held_out(listing, order, job, call)
        order = order[np.isin(order, held) == (options.side == "val")]
    with atomic_file(call.work / "order.npy") as file:
        np.save(file, order)


def _held_out(listing: Listing, order: np.ndarray, job: WriteJob, call: _Call) -> np.ndarray:
    """Int64[n]: the images that --hold-out holds out; comparing them all once serves both datasets."""
    options, chosen = call.options, np.sort(order)
    assert options.hold_out is not None
    name = f"{PARTIAL_DIR}/held-out-{listing.fingerprint()[:16]}.npy"
    if options.side == "val" and (known := call.store.read(name)) is not None:
        return np.load(io.BytesIO(known), allow_pickle=False)
    thumbs = thumbnails(job, chosen, call.how.quiet, call.how.in_process)
    held = chosen[held_out(thumbs, listing.labels[chosen], options.hold_out, options.seed)]
    if options.side == "train":
        with open_out(_beside(call.place)).writer(name) as file:
            np.save(file, held)
    return held


def _summary(
    out: Path | Url, info: dict[str, Any], started: float, already_there: bool = False, restored: int = 0
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
