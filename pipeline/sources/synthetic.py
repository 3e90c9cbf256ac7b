"""Synthetic images for tests and demos (synthetic:N): deterministic gray textures of twelve classes, drawn by numpy.

White noise is filtered to a band around the frequency and directions of a class and shaped by its profile. Frequency,
contrast, large-scale light, grain and sign vary within a class, so a nearest-neighbour search on raw pixels scores low
and a trained encoder scores high. Horizontal flips keep the class, and there is no colour. The images are free of any
license.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from pipeline.common.errors import UserError
from pipeline.sources.listing import UNKNOWN_LENGTH, Listing
from pipeline.sources.readers import Source

_PREFIX = "synthetic-"


@dataclass(frozen=True)
class SyntheticReader:
    """Images drawn on demand, a pure function of (seed, index)."""

    count: int
    seed: int

    def read(self, listing: Listing, index: int) -> bytes:
        number = listing.name(index).removeprefix(_PREFIX).removesuffix(".jpg")  # a listing may hold a part of them
        return self._images.encode(int(number))

    @cached_property
    def _images(self) -> SyntheticImages:
        return SyntheticImages(self.count, self.seed)


def open_synthetic(count_text: str, subtree: str, seed: int) -> Source:
    """``synthetic:N``: N images drawn by numpy from the seed, with labels."""
    if subtree:
        raise UserError(f"--subtree {subtree} does not go with synthetic:N, which has no folders: leave it out")
    if re.fullmatch(r"0*[1-9]\d{0,7}", count_text) is None:
        raise UserError(
            f"synthetic:{count_text}: the number of images must be a whole number of at least 1, and below 100,000,000 "
            "for their names to fit into memory"
        )
    count = int(count_text)
    images = SyntheticImages(count, seed)
    names = [f"{_PREFIX}{i:09d}.jpg".encode() for i in range(count)]
    listing = Listing(
        names=np.frombuffer(b"".join(names), np.uint8),
        name_starts=np.arange(count + 1, dtype=np.int64) * len(names[0]),
        offsets=np.zeros(count, np.int64),
        lengths=np.full(count, UNKNOWN_LENGTH, np.int64),
        labels=np.array([images.label(i) for i in range(count)], np.int32),
        classes=tuple(images.classes),
        rejected=(),
    )
    return Source(listing, SyntheticReader(count, seed), labels_from="the textures")


SIDE = 48  # px; leaves room for random crops at views of 32 px
JPEG_QUALITY = 92
Directions = Literal["any", "across", "upright", "both", "oblique"]
Profile = Literal["smooth", "ridged", "stepped"]
ANGLE_WIDTH = 0.35  # radians, standard deviation of a direction's lobe
BAND_WIDTH = 0.45  # octaves, standard deviation of the frequency band
ZOOM_RANGE = 0.35  # octaves, up or down, by which an image's frequency differs from its class's
LIGHT_FREQUENCY = 1.2  # cycles an image, of the large-scale light
TEXTURE_CONTRAST = 45.0  # standard deviation in 0..255 of the texture at full strength
STEP_SHARPNESS = 4.0  # slope of the stepped profile at its edges


DEGREES: dict[Directions, tuple[float, ...]] = {
    "any": (),
    "across": (90.0,),  # horizontal lines vary along the vertical axis
    "upright": (0.0,),
    "both": (0.0, 90.0),
    "oblique": (-45.0, 45.0),
}


@dataclass(frozen=True)
class Texture:
    """The parameters of a class."""

    frequency: float  # cycles an image
    directions: Directions
    profile: Profile


TEXTURES: dict[str, Texture] = {
    "bark": Texture(3.8, "upright", "ridged"),
    "brook": Texture(4.0, "across", "ridged"),
    "clouds": Texture(2.6, "any", "smooth"),
    "corduroy": Texture(7.2, "upright", "smooth"),
    "dunes": Texture(4.2, "across", "smooth"),
    "gravel": Texture(6.8, "any", "stepped"),
    "lattice": Texture(6.0, "oblique", "stepped"),
    "linen": Texture(7.6, "both", "ridged"),
    "marble": Texture(3.4, "any", "ridged"),
    "reeds": Texture(5.5, "upright", "stepped"),
    "strata": Texture(6.0, "across", "stepped"),
    "weave": Texture(6.0, "both", "smooth"),
}
_FY = np.fft.fftfreq(SIDE)[:, None] * SIDE
_FX = np.fft.rfftfreq(SIDE)[None, :] * SIDE
_RADIUS = np.maximum(np.hypot(_FY, _FX), 1e-6)  # cycles an image
_ANGLE = np.arctan2(_FY, _FX)
_LIGHT_FILTER = np.exp(-0.5 * (_RADIUS / LIGHT_FREQUENCY) ** 2)


@dataclass(frozen=True)
class SyntheticImages:
    """``count`` images, each a pure function of (seed, index); another seed draws others of the same classes."""

    count: int
    seed: int = 0  # not negative

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, sorted; a label is an index into them."""
        return tuple(TEXTURES)

    def __len__(self) -> int:
        return self.count

    def label(self, index: int) -> int:
        """The class of image ``index``: index mod 12. Raises IndexError outside of 0 .. count - 1."""
        self._check(index)
        return index % len(TEXTURES)

    def encode(self, index: int) -> bytes:
        """Image ``index`` as a gray JPEG of 48 x 48 px. Raises IndexError outside of 0 .. count - 1."""
        self._check(index)
        rng = np.random.default_rng((self.seed, index))
        texture = TEXTURES[self.classes[self.label(index)]]
        buffer = io.BytesIO()
        Image.fromarray(_draw(texture, rng)).save(buffer, "JPEG", quality=JPEG_QUALITY)
        return buffer.getvalue()

    def _check(self, index: int) -> None:
        if not 0 <= index < self.count:
            raise IndexError(f"image {index} of {self.count}")


def _draw(texture: Texture, rng: np.random.Generator) -> UInt8[np.ndarray, "side side"]:
    frequency = texture.frequency * 2 ** rng.uniform(-ZOOM_RANGE, ZOOM_RANGE)
    band = np.exp(-0.5 * (np.log2(_RADIUS / frequency) / BAND_WIDTH) ** 2) * _direction_filter(texture.directions)
    relief = _unit(_bend(_filtered_noise(band, rng), texture.profile))
    relief *= rng.choice((-1.0, 1.0))  # negative or not
    light = _filtered_noise(_LIGHT_FILTER, rng)
    grain = rng.standard_normal((SIDE, SIDE))
    image = (
        rng.uniform(80, 175)
        + rng.uniform(0.5, 1.0) * TEXTURE_CONTRAST * relief
        + rng.uniform(4, 30) * light
        + rng.uniform(0, 9) * grain
    )
    return np.clip(image, 0, 255).astype(np.uint8)


def _direction_filter(directions: Directions) -> Float[np.ndarray, "..."]:
    """Gain of each frequency of the half spectrum, by its direction."""
    if directions == "any":
        return np.ones(1)
    lobes = np.zeros_like(_ANGLE)
    for degrees in DEGREES[directions]:
        away = (_ANGLE - np.deg2rad(degrees) + np.pi / 2) % np.pi - np.pi / 2  # directions are equal modulo half a turn
        lobes += np.exp(-0.5 * (away / ANGLE_WIDTH) ** 2)
    return lobes


def _filtered_noise(spectrum: Float[np.ndarray, "..."], rng: np.random.Generator) -> Float[np.ndarray, "side side"]:
    noise = np.fft.rfft2(rng.standard_normal((SIDE, SIDE)))
    return _unit(np.fft.irfft2(noise * spectrum, s=(SIDE, SIDE)))


def _bend(relief: Float[np.ndarray, "side side"], profile: Profile) -> Float[np.ndarray, "side side"]:
    match profile:
        case "smooth":
            return relief
        case "ridged":
            return -np.abs(relief)
        case "stepped":
            return np.tanh(STEP_SHARPNESS * relief)


def _unit(relief: Float[np.ndarray, "side side"]) -> Float[np.ndarray, "side side"]:
    return (relief - relief.mean()) / relief.std()
