"""The last step of making a dataset: join the shards' rows into the sidecar files; write dataset.json last."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pipeline.common.errors import UserError
from pipeline.dataset.format import (
    DATASET_FILE,
    FORMAT_VERSION,
    PARTIAL_DIR,
    REENCODED_FILE,
    REJECTED_FILE,
    SAMPLE_DTYPE,
    SAMPLES_FILE,
)
from pipeline.dataset.names import NAME_STARTS_FILE, NAMES_FILE, join_names, write_name_starts
from pipeline.dataset.out_folder import OutFolder, write_json
from pipeline.sharding.write_shard import Job
from pipeline.sources.channels import ChannelSums
from pipeline.sources.class_names import check_class_number, mixed_classes, number_words

Names = Literal["from the shards", "as they are", "none"]


def complete(job: Job, about: dict[str, Any], names: Names = "from the shards") -> dict[str, Any] | None:
    """Write the sidecar files and, last, dataset.json; returns its contents, or None if shards are missing.

    ``about``: recipe, fingerprint, classes, rejected entries and notes of the source, and where they are known back
    ends that were compared and re-encoded images. ``names``: what becomes of names.bin. Raises UserError if no image is
    usable.
    """
    records = list(job.records(range(len(job))))
    present = [record for record in records if record is not None]
    if len(present) < len(job):
        return None
    shards = [record["shard"] for record in present if record["shard"]["samples"]]
    rejected = sorted([*about["rejected"], *(entry for record in present for entry in record["rejected"])])
    reasons = dict(sorted(Counter(reason for _, reason in rejected).items()))
    if not shards:
        raise UserError(f"none of the {len(rejected)} images can be used: {reasons}. Check SOURCE")
    reencoded = sorted(
        [*about.get("reencoded", []), *(entry for record in present for entry in record.get("reencoded", []))]
    )
    classes, tables = _classes_of_words(present, about["classes"])
    labels, samples_sha256 = _write_samples(job, present, tables)
    num_samples = sum(shard["samples"] for shard in shards)
    recorded_names = _write_names(job, present, num_samples, names)
    info = {
        "format_version": FORMAT_VERSION,
        "source": about["recipe"]["source"],
        "source_fingerprint": about["fingerprint"],
        "split": about["recipe"]["split"],
        "seed": about["recipe"]["seed"],
        "recipe": {name: value for name, value in about["recipe"].items() if name != "source"},
        "num_samples": num_samples,
        "num_rejected": len(rejected),
        "rejected": reasons,
        "reencoded": dict(sorted(Counter(reason for _, reason in reencoded).items())),
        "compared": about.get("compared", []),
        "classes": _checked_classes(classes, labels),
        "has_labels": labels.missing == 0,
        "num_labelled": labels.count - labels.missing,
        "labels_from": about.get("labels_from") if labels.highest >= 0 else None,
        "notes": about.get("notes", []),
        **({"tars_at": about["tars_at"]} if "tars_at" in about else {}),
        **_pixels(present),
        "samples_sha256": samples_sha256,
        **({} if recorded_names is None else {"names": recorded_names}),
        "shards": shards,
    }
    _write_list(job.store, REJECTED_FILE, rejected)
    if reencoded:
        _write_list(job.store, REENCODED_FILE, reencoded)
    write_json(job.store, DATASET_FILE, info)
    job.store.remove_partial()
    return info


def _pixels(records: list[dict[str, Any]]) -> dict[str, Any]:
    """``pixels`` of dataset.json for images of --channels; nothing for others."""
    sums = [ChannelSums(**record["sums"]) for record in records if "sums" in record]
    if not sums:
        return {}
    for one in sums[1:]:
        sums[0].add(one)
    return {"pixels": sums[0].about()}


def _write_list(out: OutFolder, name: str, entries: list[list[str]]) -> None:
    with out.writer(name) as file:
        for sample, reason in entries:
            file.write(json.dumps({"name": sample, "reason": reason}).encode() + b"\n")


def _write_names(job: Job, records: list[dict[str, Any]], samples: int, names: Names) -> dict[str, Any] | None:
    """Write names.bin and names.npy; returns ``names`` of dataset.json, or None if the dataset is to have none."""
    match names:
        case "from the shards":
            numbers = [number for number, record in enumerate(records) if record["shard"]["samples"]]
            with job.store.writer(NAMES_FILE) as text, job.store.writer(NAME_STARTS_FILE) as starts:
                return join_names(text, starts, job.encoded_names(numbers), samples)
        case "as they are":
            return write_name_starts(job.out, samples, job.out / PARTIAL_DIR)
        case "none":
            job.store.remove([NAMES_FILE, NAME_STARTS_FILE])
            return None


@dataclass
class _Labels:
    """What the labels of all samples are."""

    count: int = 0  # samples
    missing: int = 0  # of them without a label
    highest: int = -1
    highest_at: str = ""  # the sample that has it, for people

    def add(self, labels: np.ndarray, where: str) -> None:
        """Count int32 ``labels`` of the shard that ``where`` describes."""
        self.count, self.missing = self.count + len(labels), self.missing + int((labels < 0).sum())
        if (highest := int(labels.max())) > self.highest:
            self.highest, self.highest_at = highest, f"sample {int(labels.argmax())} of {where}"


def _classes_of_words(records: list[dict[str, Any]], known: list[str]) -> tuple[list[str], list[np.ndarray | None]]:
    """(class names, for each shard the number of each of its words); None: its labels are numbers already."""
    words = {word for record in records for word in record.get("words", ())}
    if not words:
        return known, [None] * len(records)
    if numbered := next((record["numbered"] for record in records if record.get("numbered")), None):
        raise UserError(mixed_classes(min(words), numbered))
    classes = known or list(number_words(words, "the tars"))
    place = {name: number for number, name in enumerate(classes)}
    if unknown := sorted(words - set(place)):
        raise UserError(f"class {unknown[0]!r} is not one of the {len(classes)} known classes: check --classes-from")
    tables = [[place[word] for word in record.get("words", ())] for record in records]
    return classes, [np.array([*table, -1], np.int32) if table else None for table in tables]


def _checked_classes(known: list[str], labels: _Labels) -> list[str]:
    """Class names; for indexed tars that have only class numbers, the numbers. Raises UserError for odd labels."""
    if known and labels.highest >= len(known):
        raise UserError(
            f"there is a label {labels.highest} ({labels.highest_at}), but only {len(known)} classes are known: check "
            "--classes-from"
        )
    if not known:
        check_class_number(labels.highest, labels.count, (), labels.highest_at)
    return known or [str(number) for number in range(labels.highest + 1)]


def _write_samples(job: Job, records: list[dict[str, Any]], tables: list[np.ndarray | None]) -> tuple[_Labels, str]:
    """Join the shards' rows into samples.npy; returns its labels and its sha256.

    ``tables``: numbers of the shards' words. Few shards are in memory at a time.
    """
    images = sum(record["shard"]["samples"] for record in records)
    labels, digest, header = _Labels(), hashlib.sha256(), io.BytesIO()
    np.lib.format.write_array_header_2_0(
        header,
        {"descr": np.lib.format.dtype_to_descr(SAMPLE_DTYPE), "fortran_order": False, "shape": (images,)},
    )
    numbers = [number for number, record in enumerate(records) if record["shard"]["samples"]]
    with job.store.writer(SAMPLES_FILE) as file:
        digest.update(header.getvalue())
        file.write(header.getvalue())
        for shard, (number, rows) in enumerate(zip(numbers, job.all_rows(numbers), strict=True)):
            rows["shard"] = shard
            if (table := tables[number]) is not None:
                rows["label"] = table[rows["label"]]
            labels.add(rows["label"], records[number]["shard"]["name"])
            digest.update(rows.tobytes())
            file.write(rows.tobytes())
    return labels, digest.hexdigest()
