"""The images that tests draw: small, smooth, a pure function of a seed."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog", "fish", "newt")
PER_CLASS = 12


def smooth_pixels(seed: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    """uint8[height, width, channels]: smooth random colours with some texture, about as compressible as a photo."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 6, channels), dtype=np.uint8)
    planes = [
        np.asarray(Image.fromarray(coarse[..., c]).resize((width, height), Image.Resampling.BICUBIC))
        for c in range(channels)
    ]
    texture = rng.normal(0, 6, (height, width, 1))
    return np.clip(np.stack(planes, -1) + texture, 0, 255).astype(np.uint8)


def image_bytes(
    seed: int, height: int = 48, width: int = 64, mode: str = "RGB", encoding: str = "JPEG", **save: object
) -> bytes:
    """An encoded image. ``mode`` and ``encoding`` are PIL's."""
    pixels = Image.fromarray(smooth_pixels(seed, height, width)).convert(mode)
    out = io.BytesIO()
    pixels.save(out, encoding, **save)
    return out.getvalue()


def write_photo_folder(root: Path, per_class: int = PER_CLASS) -> Path:
    """Class sub-folders of JPEGs of different sizes; every sixth is gray, every seventh a PNG."""
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            seed = 100 * label + i
            height, width = 40 + 13 * (seed % 7), 48 + 11 * (seed % 5)
            mode = "L" if i % 6 == 5 else "RGB"
            encoding, suffix = ("PNG", "png") if i % 7 == 6 else ("JPEG", "jpg")
            (root / name / f"{name} {i:03d}.{suffix}").write_bytes(image_bytes(seed, height, width, mode, encoding))
    return root


def write_foreign_tars(folder: Path) -> Path:
    """Two tars of webdataset's own ShardWriter: 12 images with captions, of which number 7 is cut off."""
    import webdataset  # here: it imports torch, which not all who draw images want

    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "set-%06d.tar"), maxcount=6, verbose=0, mtime=0) as writer:
        for i in range(12):
            data = image_bytes(i)[: 700 if i == 7 else None]
            writer.write({"__key__": f"deep/er/{i:03d}", "JPEG": data, "cls": str(i % 3), "caption.txt": "a dog"})
    return folder
