"""The last step of making a dataset: join the shards' rows into the sidecar files; write dataset.json last."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from typing import Any

import numpy as np

from pipeline.common.errors import UserError
from pipeline.common.files import atomic_file, write_json
from pipeline.dataset.format import (
    DATASET_FILE,
    FORMAT_VERSION,
    PARTIAL_DIR,
    REJECTED_FILE,
    SAMPLE_DTYPE,
    SAMPLES_FILE,
    file_sha256,
)
from pipeline.sharding.write_shard import Job


def complete(job: Job, about: dict[str, Any]) -> dict[str, Any] | None:
    """Write samples.npy, rejected.jsonl and, last, dataset.json; returns the contents of dataset.json.

    Returns None if shards are missing. ``about``: recipe, fingerprint, classes and rejected entries of the source.
    Raises UserError if no image is usable.
    """
    out = job.out
    records = [job.done(n) for n in range(len(job))]
    present = [record for record in records if record is not None]
    if len(present) < len(job):
        return None
    shards = [record["shard"] for record in present if record["shard"]["samples"]]
    rejected = sorted([*about["rejected"], *(entry for record in present for entry in record["rejected"])])
    reasons = dict(sorted(Counter(reason for _, reason in rejected).items()))
    if not shards:
        raise UserError(f"none of the {len(rejected)} images can be used: {reasons}. Check SOURCE")
    lowest, highest = _write_samples(job, present)
    info = {
        "format_version": FORMAT_VERSION,
        "source": about["recipe"]["source"],
        "source_fingerprint": about["fingerprint"],
        "split": about["recipe"]["split"],
        "seed": about["recipe"]["seed"],
        "recipe": {name: value for name, value in about["recipe"].items() if name != "source"},
        "num_samples": sum(shard["samples"] for shard in shards),
        "num_rejected": len(rejected),
        "rejected": reasons,
        "classes": _classes(about["classes"], highest),
        "has_labels": lowest >= 0,
        "samples_sha256": file_sha256(out / SAMPLES_FILE),
        "shards": shards,
    }
    partial = out / PARTIAL_DIR
    with atomic_file(out / REJECTED_FILE, partial) as file:
        file.writelines(json.dumps({"name": n, "reason": r}).encode() + b"\n" for n, r in rejected)
    write_json(out / DATASET_FILE, info, partial)
    shutil.rmtree(partial)
    return info


def _classes(known: list[str], highest: int) -> list[str]:
    """Class names; for indexed tars, which have only class numbers, the numbers as names."""
    if known and highest >= len(known):
        raise UserError(f"there is a label {highest}, but only {len(known)} classes are known: check --classes-from")
    return known or [str(number) for number in range(highest + 1)]


def _write_samples(job: Job, records: list[dict[str, Any]]) -> tuple[int, int]:
    """Join the shards' rows into samples.npy, one shard in memory at a time; returns the lowest and highest label."""
    images = sum(record["shard"]["samples"] for record in records)
    shard, lowest, highest = 0, np.iinfo(np.int32).max, -1
    with atomic_file(job.out / SAMPLES_FILE, job.out / PARTIAL_DIR) as file:
        header = {"descr": np.lib.format.dtype_to_descr(SAMPLE_DTYPE), "fortran_order": False, "shape": (images,)}
        np.lib.format.write_array_header_2_0(file, header)
        for number, record in enumerate(records):
            if record["shard"]["samples"] == 0:
                continue
            rows = job.rows(number)
            rows["shard"] = shard
            lowest, highest = min(lowest, int(rows["label"].min())), max(highest, int(rows["label"].max()))
            file.write(rows.tobytes())
            shard += 1
    return lowest, highest
