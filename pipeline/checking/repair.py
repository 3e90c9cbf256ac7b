"""Repair a dataset: rebuild dataset.json, samples.npy and DALI's indexes from its tars.

Tars are only read. If the sha256 of a tar differs from the recorded one, nothing is rebuilt. Without dataset.json every
image is decoded, and undecodable ones are left out. The work is done by the job that indexes tars of others, in
parallel and atomically.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pipeline.checking.check_dataset import read_entries
from pipeline.checking.check_shard import Findings, recorded_options
from pipeline.common.errors import UserError
from pipeline.common.files import disk_errors, real_folder
from pipeline.common.locations import WDS
from pipeline.common.locks import exclusive_lock
from pipeline.dataset.format import (
    DATASET_FILE,
    PARTIAL_DIR,
    REENCODED_FILE,
    REJECTED_FILE,
    SAMPLES_FILE,
    file_sha256,
    read_dataset_file,
)
from pipeline.dataset.names import NAME_STARTS_FILE, NAMES_FILE, decode_names, read_names, read_pieces
from pipeline.dataset.shard_tar import split_key
from pipeline.sharding.decode_service import Decoders, OwnDecoders
from pipeline.sharding.finalize import Names, complete
from pipeline.sharding.index_tars import IndexJob
from pipeline.sharding.options import ShardingOptions
from pipeline.sharding.workers import build_missing
from pipeline.sharding.write_shard import key_stem
from pipeline.sources.image_file import Verify

UNKNOWN_SOURCE = "(unknown: repaired from its tars)"
UNKNOWN_SEED = -1  # make_shards takes no negative seed


@dataclass(frozen=True)
class Repaired:
    """Result of a repair."""

    rewritten: tuple[str, ...]  # files whose bytes changed
    lost: tuple[str, ...]  # descriptions of what could not be restored


@dataclass
class RepairJob(IndexJob):
    """The dataset's own tars, indexed again; the indexes keep their names."""

    indexes: list[str]
    decoders: Decoders | None = None

    def index_name(self, number: int) -> str:
        return self.indexes[number]


def repair_dataset(path: Path, workers: int, *, quiet: bool = False, in_process: bool = False) -> Repaired:
    """Rebuild the sidecar files of the dataset in folder ``path``.

    Raises UserError if that is impossible: no tars, a damaged tar, a tar that is not the recorded one, a full disk.
    """
    info = _readable_record(path)
    if info is not None and "pixels" in info:
        raise UserError(
            f"{path} has images of {info['pixels']['channels']} channels, which --repair does not make records of: run "
            "the make_shards command of it again, which writes lost shards, or say --overwrite there"
        )
    job = _lost_job(path, workers) if info is None else _known_job(path, info, workers)
    partial = path / PARTIAL_DIR
    with disk_errors(f"repairing {path}", f"{path} cannot be repaired", "remove what is no file of a dataset"):
        real_folder(partial)
        with exclusive_lock(partial / "lock", shared=False) as lock:
            try:
                (partial / _OURS).touch()
                shutil.rmtree(partial / "done", ignore_errors=True)  # left by a killed repair
                before = _contents(path, job)
                build_missing(job, job.options, quiet, in_process, check=lock.check)
                lost = _finish(job, info)
            finally:
                shutil.rmtree(partial, ignore_errors=True)  # it holds only files of this repair
        after = _contents(path, job)
    return Repaired(tuple(name for name in after if after[name] != before[name]), tuple(lost))


_OURS = "repair"  # this file in .partial marks the folder as a repair's, to be deleted, not as unfinished sharding


def _readable_record(path: Path) -> dict[str, Any] | None:
    """dataset.json, or None if it is lost. Raises UserError if ``path`` holds no dataset."""
    partial = path / PARTIAL_DIR
    unfinished = partial.exists() and not (partial / _OURS).exists()
    if not path.is_dir() or (unfinished and not (path / DATASET_FILE).exists()):
        return read_dataset_file(path)  # raises the UserError
    try:
        return read_dataset_file(path, check_files=False)
    except UserError as error:
        if "format version" in str(error):
            raise
        return None


def _known_job(path: Path, info: dict[str, Any], workers: int) -> RepairJob:
    """Images of our own tars were verified when written; those of indexed tars are verified again as recorded."""
    recipe, foreign = info["recipe"], info["source"].startswith(WDS)
    verify: Verify = "full" if foreign and recipe.get("verify") == "full" else "header"
    options = replace(recorded_options(recipe), workers=workers, verify=verify)
    tars = [path / shard["name"] for shard in info["shards"]]
    for tar, shard in zip(tars, info["shards"], strict=True):
        if not tar.is_file() or tar.stat().st_size != shard["bytes"]:
            raise UserError(f"{tar} is missing or has another length than recorded: {_FETCH}")
    decoders = OwnDecoders() if "dali" in info.get("compared", []) else None  # chosen again as they were
    return RepairJob(path, tars, options, [shard["index"] for shard in info["shards"]], decoders)


_FETCH = "a repair needs every tar as it was written; copy it again from where the dataset came from"


def _lost_job(path: Path, workers: int) -> RepairJob:
    tars = sorted(path.glob("shard-*.tar")) or sorted(path.glob("*.tar"))
    if not tars:
        raise UserError(
            f"{path} has neither a readable {DATASET_FILE} nor tars of its own: if it was made from wds:PATTERN, run "
            "make_shards with that SOURCE again, with --overwrite"
        )
    own = [tar.with_suffix(".idx").name for tar in tars]
    return RepairJob(path, tars, ShardingOptions(workers=workers, sixteen_bit="full-range"), own)


def _finish(job: RepairJob, info: dict[str, Any] | None) -> list[str]:
    """Compare with dataset.json, write the sidecar files; returns descriptions of what is lost."""
    records = list(job.records(range(len(job))))
    assert all(records), "every shard was built"
    again = [record["shard"] for record in records if record is not None]
    refused = {(name, reason) for record in records if record is not None for name, reason in record["rejected"]}
    if info is not None:
        for tar, shard, recorded in zip(job.tars, again, info["shards"], strict=True):
            if shard["sha256"] != recorded["sha256"]:
                raise UserError(f"{tar} has changed since it was written: {_FETCH}")
    earlier = read_entries(job.out / REJECTED_FILE, Findings(REJECTED_FILE))
    about: dict[str, Any] = {
        "recipe": {"source": UNKNOWN_SOURCE, "split": None, "seed": UNKNOWN_SEED},
        "fingerprint": "",
        "classes": [],
        "rejected": [[name, reason] for name, reason in earlier if (name, reason) not in refused],
    }
    if info is not None:
        about["recipe"] = {"source": info["source"], **info["recipe"], "split": info["split"], "seed": info["seed"]}
        about["fingerprint"], about["classes"] = info.get("source_fingerprint", ""), info["classes"]
        about.update({name: info[name] for name in ("labels_from", "notes", "compared") if name in info})
    about["reencoded"] = read_entries(job.out / REENCODED_FILE, Findings(REENCODED_FILE))
    had_names = (job.out / NAMES_FILE).exists() or (info is not None and "names" in info)
    names = _names(job, info, again)
    done = complete(job, about, names)
    assert done is not None
    lost = _losses(info, done, len(refused))
    if had_names and names == "none":
        lost.append("the paths of the samples in the source (dataset.names)")
    return lost


def _names(job: RepairJob, info: dict[str, Any] | None, shards: list[dict[str, Any]]) -> Names:
    """What becomes of names.bin: of indexed tars it is made again; else it stays if it is the recorded one.

    Without a record it stays if each name fits the key of its sample.
    """
    file = job.out / NAMES_FILE
    if info is not None and info["source"].startswith(WDS):
        return "from the shards"
    if not file.is_file():
        return "none"
    if info is not None:
        as_many = sum(piece.count(0) for piece in read_pieces(file)) == sum(shard["samples"] for shard in shards)
        return "as they are" if as_many and file_sha256(file) == info.get("names", {}).get("sha256") else "none"
    encoded = job.encoded_names([n for n, shard in enumerate(shards) if shard["samples"]])
    members = (name for names in encoded for name in decode_names(names))
    pairs = zip_longest(map(key_stem, read_names(file)), members)
    fits = all(stem is not None and member is not None and stem == _stem_of(member) for stem, member in pairs)
    return "as they are" if fits else "none"


def _stem_of(member: str) -> str:
    """What the key of a member, ``shard-000000.tar/000000007_name.jpg``, says of the image's name."""
    return split_key(member)[0].rpartition("/")[2].partition("_")[2]


def _losses(info: dict[str, Any] | None, done: dict[str, Any], refused: int) -> list[str]:
    lost = []
    if info is None:
        names = f"the {len(done['classes'])} classes are called by their numbers" if done["classes"] else "no classes"
        lost.append(f"the source, the seed of the shuffle, the split and the names of the classes ({names} now)")
        if refused:
            lost.append(f"{refused} entries of the tars that hold no image that can be decoded (see rejected.jsonl)")
    elif done["num_rejected"] < info.get("num_rejected", 0):
        lost.append(f"the names of {info['num_rejected'] - done['num_rejected']} images that were refused")
    return lost


def _contents(path: Path, job: RepairJob) -> dict[str, str]:
    """sha256 of each sidecar file; "" where it is missing."""
    names = [DATASET_FILE, SAMPLES_FILE, NAMES_FILE, NAME_STARTS_FILE, REJECTED_FILE, *job.indexes]
    return {name: file_sha256(path / name) if (path / name).exists() else "" for name in names}
