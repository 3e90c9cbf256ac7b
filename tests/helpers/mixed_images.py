"""A folder as people have it: images of many formats and sizes in one place, some of them broken, and a few labels."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
from PIL import Image

KINDS = ("stripes", "checks", "dots", "waves")
FORMATS = (
    ("JPEG", "jpg", "RGB"),
    ("JPEG", "JPG", "L"),
    ("PNG", "png", "RGB"),
    ("PNG", "png", "RGBA"),
    ("PNG", "png", "I;16"),
    ("WEBP", "webp", "RGB"),
    ("BMP", "bmp", "RGB"),
    ("TIFF", "tif", "RGB"),
    ("PNG", "png", "P"),
)


def drawn(kind: str, seed: int) -> np.ndarray:
    """uint8 ``[h, w, 3]``: a pattern of the kind, in colours, size and place of its own."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(40, 90, 2)
    y, x = np.mgrid[:height, :width] + rng.uniform(0, 20, 2)[:, None, None]
    period = rng.uniform(8, 14)
    across, down = np.sin(2 * np.pi * x / period), np.sin(2 * np.pi * y / period)
    relief = {
        "stripes": across,
        "checks": np.sign(across) * np.sign(down),
        "dots": np.maximum(across, 0) * np.maximum(down, 0) * 2 - 1,
        "waves": np.sin(2 * np.pi * (y / period + 0.4 * np.sin(2 * np.pi * x / 25))),
    }[kind]
    one, other = rng.uniform(40, 215, (2, 3))
    pixels = one + (other - one) * (relief[..., None] + 1) / 2 + rng.normal(0, 8, (height, width, 1))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def write_mixed_folder(folder: Path, count: int, labels: Path, labelled: int) -> int:
    """Write ``count`` images and a CSV of labels of the first ``labelled``; returns how many files are no images.

    Every fiftieth is cut off, and there is a text file among them.
    """
    folder.mkdir(parents=True)
    rows, broken = [], 1
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        encoding, suffix, mode = FORMATS[(number // len(KINDS)) % len(FORMATS)]
        pixels = drawn(kind, number)
        if mode == "I;16":
            image = Image.fromarray((pixels.mean(axis=2) * 200 + 1000).astype(np.uint16))
        else:
            image = Image.fromarray(pixels).convert(mode)
        out = io.BytesIO()
        image.save(out, encoding)
        data = out.getvalue()
        name = f"IMG {number:05d}.{suffix}"
        if number % 50 == 49:
            data, broken = data[: len(data) // 2], broken + 1
        elif number < labelled:
            rows.append((name, kind))
        (folder / name).write_bytes(data)
    (folder / "notes.txt").write_text("not an image")
    with open(labels, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return broken
