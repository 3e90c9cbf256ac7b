"""Synthetic JPEGs with ImageNet's sizes, bytes per pixel and share of gray images, for measurements without ImageNet.

The cost of decoding depends on pixels and bytes. Of 1000 images of ImageNet the mean was 110 KB and 468 x 401 px, a
fifth had exactly 500 x 375 px, three in four full colour resolution (4:4:4) at quality 95 and above, and 2 % were gray.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from pipeline.common.errors import UserError
from pipeline.common.system import cores
from pipeline.dataset.format import DATASET_FILE
from pipeline.sharding.make_dataset import make_dataset
from pipeline.sharding.options import ShardingOptions

# Width, height in px, and how often.
SIZES = (
    ((500, 375), 0.5),
    ((375, 500), 0.14),
    ((500, 333), 0.2),
    ((333, 500), 0.07),
    ((640, 480), 0.05),
    ((320, 240), 0.04),
)
MEAN_BYTES = 110_000  # at 500 x 375 px
BYTES_SPREAD = 0.35  # standard deviation of the logarithm
GRAY_SHARE = 0.02
QUALITY = 95
FULL_COLOUR_SHARE = 0.75
CLASSES = 10
SLOPE = 1.0  # noise whose amplitude falls with 1 / frequency has the spectrum of photographs (Field 1987)


@contextmanager
def dataset_folder(keep: Path | None, samples: int) -> Iterator[Path]:
    """A dataset of ``samples`` images in the folder ``keep``, reused if it exists; None: in a temporary folder.

    Raises UserError as make_dataset does.
    """
    with ExitStack() as passing:
        folder = keep or Path(passing.enter_context(tempfile.TemporaryDirectory(prefix="siamstream-")))
        if not (folder / DATASET_FILE).exists():
            draw_dataset(folder, samples)
        yield folder


def draw_dataset(folder: Path, samples: int) -> None:
    """Write ``samples`` images as a dataset. Raises UserError as make_dataset does."""
    if samples < 1:
        raise UserError(f"--synthetic-samples {samples}: draw at least 1")
    with tempfile.TemporaryDirectory(prefix="siamstream-") as images:
        write_images(Path(images), samples, cores())
        make_dataset(images, folder, ShardingOptions(verify="header"), quiet=True)


def write_images(folder: Path, count: int, threads: int, seed: int = 0) -> None:
    """Write ``count`` JPEGs into class folders below ``folder``. The same seed gives the same images."""
    for label in range(CLASSES):
        (folder / f"class-{label}").mkdir(parents=True, exist_ok=True)

    def write(number: int) -> None:
        (folder / f"class-{number % CLASSES}" / f"{number:06d}.jpg").write_bytes(draw_jpeg(seed, number))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, range(count)))


def draw_jpeg(seed: int, number: int) -> bytes:
    """One JPEG; the same arguments give the same bytes."""
    rng = np.random.default_rng((seed, number))
    sizes, shares = zip(*SIZES, strict=True)
    width, height = sizes[rng.choice(len(sizes), p=np.array(shares) / sum(shares))]
    spread = rng.normal(-(BYTES_SPREAD**2) / 2, BYTES_SPREAD)  # its exponential has mean 1
    wanted = MEAN_BYTES * np.exp(spread) * width * height / (500 * 375)
    gray = rng.random() < GRAY_SHARE
    subsampling = 0 if rng.random() < FULL_COLOUR_SHARE else 2
    planes = [_photo_noise(rng, height, width) for _ in range(1 if gray else 3)]
    light = rng.uniform(90, 165)
    # Bytes grow about linearly with contrast: two trials, then the line through them.
    trials = [(gain, len(_encode(planes, gain, light, subsampling))) for gain in (12.0, 48.0)]
    (low, few), (high, many) = trials
    gain = np.clip(low + (wanted - few) * (high - low) / max(many - few, 1), 2.0, 90.0)
    return _encode(planes, gain, light, subsampling)


def _photo_noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Float32[h, w] of mean 0 and standard deviation 1, with a photograph's spectrum."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width)[None] * width)
    frequency[0, 0] = np.inf
    shape = (height, width // 2 + 1)
    waves = rng.standard_normal(shape, dtype=np.float32) + 1j * rng.standard_normal(shape, dtype=np.float32)
    plane = np.fft.irfft2(waves / frequency**SLOPE, s=(height, width))
    return (plane / plane.std()).astype(np.float32)


def _encode(planes: list[np.ndarray], gain: float, light: float, subsampling: int) -> bytes:
    pixels = _colours(planes, gain, light)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY, subsampling=subsampling)
    return buffer.getvalue()


def _colours(planes: list[np.ndarray], gain: float, light: float) -> UInt8[np.ndarray, "..."]:
    """Brightness varies most, colours less, as in photographs."""
    base = light + gain * planes[0]
    if len(planes) == 1:
        return np.clip(base, 0, 255).astype(np.uint8)
    red, blue = 0.4 * gain * planes[1], 0.4 * gain * planes[2]
    return np.clip(np.stack([base + red, base - (red + blue) / 2, base + blue], axis=-1), 0, 255).astype(np.uint8)
