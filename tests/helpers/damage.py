"""Damages a written dataset: bytes that changed on the disk, and images that no decoder takes."""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from pathlib import Path

import numpy as np

from pipeline.dataset.dataset import ShardSet
from pipeline.dataset.format import DATASET_FILE, SAMPLES_FILE


def copy_dataset(source: Path, target: Path) -> Path:
    """A dataset of one's own to damage."""
    shutil.copytree(source, target)
    return target


def change_bytes(path: Path, sample_ids: list[int]) -> None:
    """Turn over a byte in the middle of some images, as a failing disk does: their checksums no longer fit."""
    dataset = ShardSet.open(path)
    for sample_id in sample_ids:
        row = dataset.samples[sample_id]
        with open(dataset.shard_path(int(row["shard"])), "r+b") as file:
            middle = int(row["offset"]) + int(row["length"]) // 2
            file.seek(middle)
            byte = file.read(1)[0]
            file.seek(middle)
            file.write(bytes([byte ^ 255]))


def put_image(path: Path, sample_id: int, image: bytes, size: tuple[int, int] | None = None) -> None:
    """Put other bytes in a sample's place with a checksum that fits; ``size``: height and width to record."""
    dataset = ShardSet.open(path)
    samples = np.array(dataset.samples)
    row = samples[sample_id]
    assert len(image) <= row["length"], "there is no room for this image"
    with open(dataset.shard_path(int(row["shard"])), "r+b") as file:
        file.seek(int(row["offset"]))
        file.write(image)
    row["length"], row["checksum"] = len(image), zlib.crc32(image)
    if size is not None:
        row["height"], row["width"] = size
    samples[sample_id] = row
    np.save(path / SAMPLES_FILE, samples)
    info = json.loads((path / DATASET_FILE).read_text())
    info["samples_sha256"] = hashlib.sha256((path / SAMPLES_FILE).read_bytes()).hexdigest()
    (path / DATASET_FILE).write_text(json.dumps(info))
