"""What happens to a sample: the recipe of its views and the draw of their parameters.

A draw is a pure function of (recipe, seed, epoch, sample id, image size). The back ends draw nothing themselves: they
apply these numbers. Recipe: MoCo v2's augmentation as SimSiam uses it (Chen & He 2020, appendix A); distributions and
their parameters are those of torchvision's transforms of the same names.

A recipe has one or more groups of views. The fields of ``ViewRecipe`` are those of the first group; ``more_views`` adds
others, which differ from it in the fields that they name:

    ViewRecipe()                                            # two views of 224 px: SimSiam, MoCo
    ViewRecipe(count=1, blur_prob=1.0,                      # two unlike views: BYOL
               more_views=(ViewGroup(blur_prob=0.1, solarize_prob=0.2),))
    ViewRecipe(crop_scale=(0.14, 1.0),                      # 2 x 224 + 6 x 96 px: SwAV's multi-crop
               more_views=(ViewGroup(count=6, image_size=96, crop_scale=(0.05, 0.14)),))
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal, get_args

import numpy as np
import tyro
from jaxtyping import Bool, Float32, Float64, Int8, Int32, UInt32
from numpy.typing import NDArray

from pipeline.common.errors import UserError, require
from pipeline.common.flags import own_flags
from pipeline.sampling.augmentations import DRAWS, Augmentations
from pipeline.sampling.counter_rng import philox4x32, seed_key, uniforms

MAX_VIEWS = 256  # the counters of the draws have 8 bits for the view
PAIR_EPOCHS = 1 << 24  # the second pair of views of a sample in epoch e is drawn as in epoch e + PAIR_EPOCHS
CROP_ATTEMPTS = 10  # torchvision.transforms.RandomResizedCrop.get_params
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # the colour operations, as numbered in ViewParams.order
JITTER_ORDERS = np.array(list(itertools.permutations(range(4))), dtype=np.int8)
VIEW_STREAM = 0x51E5  # keeps the views' counters apart from those of the order
EXTRA_STREAM = 0xE47A  # and those of further augmentations apart from both
SMALL_VIEW = 64  # px; from here down the evaluation view keeps the whole shorter side
# Where each draw lies among a view's uniform numbers.
AREAS = slice(0, CROP_ATTEMPTS)
ASPECTS = slice(CROP_ATTEMPTS, 2 * CROP_ATTEMPTS)
TOP, LEFT, FLIP, JITTER, ORDER = range(20, 25)
FACTORS = slice(25, 29)
GRAY, BLUR, SIGMA, SOLARIZE = range(29, 33)
PHILOX_BLOCKS = 9  # of four numbers each
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB, of 1
COLOUR_PROBS = ("jitter_prob", "gray_prob", "solarize_prob")  # of what changes colours
Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class ViewGroup:
    """Further views of each image; a field that is None is as in the recipe's first group.

    Written as words on the command line: ``count=6 image-size=96 crop-scale=0.05,0.14``.
    """

    count: int = 1
    image_size: int | None = None
    crop_scale: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] | None = None
    interpolation: Interpolation | None = None
    flip_prob: float | None = None
    jitter_prob: float | None = None
    brightness: float | None = None
    contrast: float | None = None
    saturation: float | None = None
    hue: float | None = None
    gray_prob: float | None = None
    blur_prob: float | None = None
    blur_sigma: tuple[float, float] | None = None
    blur_radius: int | None = None
    solarize_prob: float | None = None
    solarize_threshold: int | None = None

    @property
    def changes(self) -> dict[str, Any]:
        """The fields that are set, by name; ``count`` always is."""
        fields = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: value for name, value in fields if value is not None}

    def __str__(self) -> str:
        words = ((name.replace("_", "-"), value) for name, value in self.changes.items())
        return " ".join(
            f"{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}" for name, value in words
        )


def parse_group(text: str) -> ViewGroup:
    """The group that words such as ``count=6 image-size=96 crop-scale=0.05,0.14`` describe. Raises UserError."""
    fields: dict[str, Any] = {}
    for word in text.split():
        name, _, value = word.partition("=")
        field_name = name.replace("-", "_")
        if field_name not in _GROUP_FIELDS:
            known = ", ".join(field.replace("_", "-") for field in _GROUP_FIELDS)
            raise UserError(f"'{text}': {word} is not NAME=VALUE with a NAME among {known}")
        if field_name in fields:
            raise UserError(f"'{text}': {name} is given twice")
        if field_name == "interpolation" and value not in get_args(Interpolation):
            raise UserError(f"'{text}': {word}: interpolation is one of {', '.join(get_args(Interpolation))}")
        default = getattr(ViewRecipe, field_name)  # the first group's, of the same type
        try:
            fields[field_name] = _pair(value) if isinstance(default, tuple) else type(default)(value)
        except ValueError:
            wanted = "two numbers, such as 0.05,0.14" if isinstance(default, tuple) else f"a number, such as {default}"
            raise UserError(f"'{text}': {word}: {name} takes {wanted}") from None
    return ViewGroup(**fields)


def _pair(text: str) -> tuple[float, float]:
    low, high = map(float, text.split(","))
    return low, high


_GROUP_FIELDS = tuple(field.name for field in dataclasses.fields(ViewGroup))
_GROUPS = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="'NAME=VALUE ...'",
    instance_from_str=lambda texts: tuple(map(parse_group, texts)),
    is_instance=lambda value: isinstance(value, tuple) and all(isinstance(group, ViewGroup) for group in value),
    str_from_instance=lambda groups: [f"'{group}'" for group in groups],
)


@own_flags
@dataclass(frozen=True)
class ViewRecipe:
    """How views are drawn. The defaults are SimSiam's for ImageNet (appendix A, after MoCo v2)."""

    # Side of a view in pixels [Chen & He 2020, section 3].
    image_size: int = 224
    # Views of each image that are drawn alike; --more-views adds unlike ones.
    count: Annotated[int, tyro.conf.arg(name="views")] = 2
    # Share of the image's area that a crop covers, lowest and highest [appendix A, after MoCo v2].
    crop_scale: tuple[float, float] = (0.2, 1.0)
    # Width / height of a crop, lowest and highest, drawn log-uniformly [torchvision].
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    # How a crop is resized; SimCLR's and BYOL's own code take bicubic.
    interpolation: Interpolation = "bilinear"
    # Probability of a horizontal flip.
    flip_prob: float = 0.5
    # Probability of the four colour operations together [appendix A].
    jitter_prob: float = 0.8
    # Change brightness by a factor from 1 - x to 1 + x.
    brightness: float = 0.4
    # Change contrast by a factor from 1 - x to 1 + x.
    contrast: float = 0.4
    # Change saturation by a factor from 1 - x to 1 + x.
    saturation: float = 0.4
    # Shift the hue by -x to x turns of the colour circle.
    hue: float = 0.1
    # Probability that all three channels become the gray value.
    gray_prob: float = 0.2
    # Probability of a Gaussian blur (the CIFAR-10 recipe has none: appendix D).
    blur_prob: float = 0.5
    # Standard deviation of the blur in pixels of the view, lowest and highest.
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    # Reach of the blur's window in pixels [a window of 23, which SimCLR takes at 224 px].
    blur_radius: int = 11
    # Probability that bright pixels are inverted; BYOL's addition, SimSiam does without.
    solarize_prob: float = 0.0
    # Smallest byte that solarizing inverts, 0 (all) to 256 (none).
    solarize_threshold: int = 128
    # Mean of each channel, of 1, that is subtracted [ImageNet; of a dataset of --channels its own].
    mean: tuple[float, ...] = IMAGENET_MEAN
    # Standard deviation of each channel, of 1, that is divided by [ImageNet; of a dataset of --channels its own].
    std: tuple[float, ...] = IMAGENET_STD
    # Further groups of views, each in quotes, such as 'count=6 image-size=96 crop-scale=0.05,0.14'; what a group does
    # not name is as in the first. SwAV's multi-crop (Caron et al. 2020), BYOL's unlike views (Grill et al. 2020).
    more_views: Annotated[tuple[ViewGroup, ...], _GROUPS] = ()
    # Further augmentations, off by default; they are applied last, in the order of their fields
    extra: Annotated[Augmentations, tyro.conf.arg(name="")] = field(default_factory=Augmentations)

    def __post_init__(self) -> None:
        require("--image-size", self.image_size, self.image_size >= 2, "a view has at least 2 px a side")
        require("--views", self.count, self.count >= 1, "each image is seen in at least 1 view")
        rule = f"it is one of {', '.join(get_args(Interpolation))}"
        require("--interpolation", self.interpolation, self.interpolation in get_args(Interpolation), rule)
        for name in ("flip", "jitter", "gray", "blur", "solarize"):
            probability = getattr(self, f"{name}_prob")
            require(f"--{name}-prob", probability, 0 <= probability <= 1, "a probability lies in 0 .. 1")
        for name in ("crop_scale", "crop_ratio", "blur_sigma"):
            low, high = getattr(self, name)
            rule = "it takes two numbers, 0 < low <= high"
            require(f"--{name.replace('_', '-')}", (low, high), 0 < low <= high < math.inf, rule)
        require("--crop-scale", self.crop_scale, self.crop_scale[1] <= 1, "a crop is no larger than its image")
        for name in ("brightness", "contrast", "saturation"):
            require(f"--{name}", getattr(self, name), 0 <= getattr(self, name) <= 1, "it lies in 0 .. 1")
        require("--hue", self.hue, 0 <= self.hue <= 0.5, "it lies in 0 .. 0.5 turns of the colour circle")
        require("--blur-radius", self.blur_radius, self.blur_radius >= 1, "the window reaches at least 1 px")
        threshold = self.solarize_threshold
        require("--solarize-threshold", threshold, 0 <= threshold <= 256, "it lies in 0 (all) .. 256 (none)")
        require(
            "--mean", self.mean, bool(self.mean) and all(map(math.isfinite, self.mean)), "it takes a number a channel"
        )
        require("--std", self.std, len(self.std) == len(self.mean), "it takes as many numbers as --mean")
        require("--std", self.std, all(0 < std < math.inf for std in self.std), "a standard deviation is above 0")
        if self.channels != 3 and (colour := self._colour_flag()):
            raise UserError(
                f"{colour} is of images of 3 channels, and --mean has {self.channels} numbers: take {colour} 0, or "
                "leave --mean and --std out, which a dataset of other channels brings itself"
            )
        for group in self.more_views:
            require(f"--more-views '{group}': count", group.count, group.count >= 1, "a group has at least 1 view")
            try:
                self._with(group)
            except UserError as error:
                raise UserError(f"--more-views '{group}': {str(error).removeprefix('--')}") from None
        total = self.count + sum(group.count for group in self.more_views)
        rule = f"the draws tell at most {MAX_VIEWS} views of an image apart: take fewer --views or smaller groups"
        require("views of each image:", total, total <= MAX_VIEWS, rule)

    @property
    def channels(self) -> int:
        """Of the images."""
        return len(self.mean)

    def of_channels(self, mean: tuple[float, ...], std: tuple[float, ...]) -> ViewRecipe:
        """This recipe for images of other channels than 3: crops, flips and blur, nothing that is of colours."""
        off: dict[str, Any] = dict.fromkeys(COLOUR_PROBS, 0.0)
        groups = tuple(dataclasses.replace(group, **_named_in(off, group)) for group in self.more_views)
        bytewise: dict[str, Any] = {
            name: dataclasses.replace(one, prob=0.0) for name, (_, one) in self.extra.active().items() if one.on_bytes
        }
        extra = dataclasses.replace(self.extra, **bytewise)
        return dataclasses.replace(self, mean=mean, std=std, more_views=groups, extra=extra, **off)

    def _colour_flag(self) -> str | None:
        """The flag of what is of colours and switched on in this group; None if nothing is."""
        on = [f"--{name.replace('_', '-')}" for name in COLOUR_PROBS if getattr(self, name) > 0]
        on += [one.flag("prob") for _, one in self.extra.active().values() if one.on_bytes]
        return on[0] if on else None

    @cached_property
    def per_view(self) -> tuple[ViewRecipe, ...]:
        """Each view's own recipe, of one group, in the order of the views: the first group's, then those of others."""
        groups = (self, *(self._with(group) for group in self.more_views))
        return tuple(group for group in groups for _ in range(group.count))

    @property
    def blur_window(self) -> int:
        """Width of the blur's window in px, odd; reflection at the border allows no more than the view's side."""
        return 2 * min(self.blur_radius, self.image_size - 1) + 1

    def identity(self) -> dict[str, Any]:
        """What decides the views, by field. What older checkpoints lack is left out where it changes nothing."""
        fields = dataclasses.asdict(self)
        del fields["extra"], fields["more_views"]
        for name in ("count", "interpolation"):
            if fields[name] == getattr(ViewRecipe, name):
                del fields[name]
        if self.more_views:
            fields["more_views"] = [group.changes for group in self.more_views]
        return {**fields, **{name: dataclasses.asdict(one) for name, (_, one) in self.extra.active().items()}}

    def _with(self, group: ViewGroup) -> ViewRecipe:
        return dataclasses.replace(self, more_views=(), **group.changes)


@dataclass(frozen=True)
class ViewParams:
    """What is done to n samples in each of their views, in the order of the fields; axes are sample and view."""

    crop: Int32[np.ndarray, "n views 4"]  # top, left, height, width; px of the image
    jitter: Bool[np.ndarray, "n views"]  # whether the four colour operations are applied
    order: Int8[np.ndarray, "n views 4"]  # in which order: BRIGHTNESS, CONTRAST, SATURATION, HUE
    factors: Float32[np.ndarray, "n views 4"]  # of brightness, contrast, saturation; and the hue's shift in turns
    gray: Bool[np.ndarray, "n views"]
    sigma: Float32[np.ndarray, "n views"]  # of the blur, px of the view; 0: none
    solarize: Bool[np.ndarray, "n views"]
    flip: Bool[np.ndarray, "n views"]
    extra: Float64[np.ndarray, "n views augmentations draws"]  # random numbers of ViewRecipe.extra; none if all is off

    def __len__(self) -> int:
        return len(self.crop)

    @property
    def views(self) -> int:
        return self.crop.shape[1]


def draw_views(
    recipe: ViewRecipe,
    seed: int,
    epoch: NDArray[np.int64] | int,
    ids: NDArray[np.int64],
    sizes: Int32[np.ndarray, "n 2"],
) -> ViewParams:
    """Draw all views of some samples, those of the first group first.

    ``epoch``: one for all, or int64 ``[n]``, one for each; ``ids``: int64 ``[n]`` sample ids; ``sizes``: their images'
    height and width in px. A sample's draw depends on nothing but its own row of these, the recipe and the seed; and of
    the recipe a view's random numbers depend on nothing but the view's number.
    """
    draws = uniforms(_bits(seed, epoch, ids, len(recipe.per_view), VIEW_STREAM, PHILOX_BLOCKS))
    prob = {name: _per_view(recipe, f"{name}_prob") for name in ("jitter", "gray", "blur", "solarize", "flip")}
    spread = np.stack([_per_view(recipe, name) for name in ("brightness", "contrast", "saturation", "hue")], axis=-1)
    centre = np.array([1.0, 1.0, 1.0, 0.0])
    sigma = _between(draws[..., SIGMA], *_per_view(recipe, "blur_sigma").T)
    return ViewParams(
        crop=_draw_crops(recipe, draws, sizes),
        jitter=draws[..., JITTER] < prob["jitter"],
        order=JITTER_ORDERS[(draws[..., ORDER] * len(JITTER_ORDERS)).astype(np.int64)],
        factors=_between(draws[..., FACTORS], centre - spread, centre + spread).astype(np.float32),
        gray=draws[..., GRAY] < prob["gray"],
        sigma=np.where(draws[..., BLUR] < prob["blur"], sigma, 0.0).astype(np.float32),
        solarize=draws[..., SOLARIZE] < prob["solarize"],
        flip=draws[..., FLIP] < prob["flip"],
        extra=_draw_extra(recipe, seed, epoch, ids),
    )


@dataclass(frozen=True)
class CentreCrops:
    """The evaluation view of n images: resize to ``resized``, then cut a square at ``corner``."""

    resized: Int32[np.ndarray, "n 2"]  # height, width; px
    corner: Int32[np.ndarray, "n 2"]  # top, left; px of the resized image
    start: Float32[np.ndarray, "n 2"]  # the same square in px of the image: top, left
    end: Float32[np.ndarray, "n 2"]  # bottom, right

    def __len__(self) -> int:
        return len(self.resized)


def centre_crops(image_size: int, sizes: Int32[np.ndarray, "n 2"]) -> CentreCrops:
    """ImageNet's evaluation view as torchvision's Resize and CenterCrop make it: 224 px out of a shorter side of 256.

    Views of 64 px and below are made from small images, which have no margin to lose: there the shorter side becomes
    ``image_size``. ``sizes``: height and width, px.
    """
    shorter_side = image_size if image_size <= SMALL_VIEW else image_size * 256 // 224
    longer = sizes.astype(np.int64)
    shortest = longer.min(axis=1, keepdims=True)
    resized = np.where(longer == shortest, shorter_side, shorter_side * longer // shortest)
    corner = np.rint((resized - image_size) / 2)
    scale = sizes / resized
    return CentreCrops(
        resized=resized.astype(np.int32),
        corner=corner.astype(np.int32),
        start=(corner * scale).astype(np.float32),
        end=((corner + image_size) * scale).astype(np.float32),
    )


def _named_in(values: dict[str, Any], group: ViewGroup) -> dict[str, Any]:
    """Those of ``values`` whose field the group sets, and does not take from the first group."""
    return {name: value for name, value in values.items() if name in group.changes}


def _per_view(recipe: ViewRecipe, name: str) -> Float64[np.ndarray, "*views_and_pair"]:
    return np.array([getattr(group, name) for group in recipe.per_view], dtype=np.float64)


def _draw_extra(
    recipe: ViewRecipe, seed: int, epoch: NDArray[np.int64] | int, ids: NDArray[np.int64]
) -> Float64[np.ndarray, "n views augmentations draws"]:
    count = len(dataclasses.fields(recipe.extra)) if recipe.extra.active() else 0
    bits = _bits(seed, epoch, ids, len(recipe.per_view), EXTRA_STREAM, count * DRAWS // 4)
    return uniforms(bits).reshape(len(ids), len(recipe.per_view), count, DRAWS)


def _bits(
    seed: int, epoch: NDArray[np.int64] | int, ids: NDArray[np.int64], views: int, stream: int, blocks: int
) -> UInt32[np.ndarray, "n views draws"]:
    """The random words of each view of each sample, ``blocks`` times four of them."""
    counters = np.empty((len(ids), views, blocks, 4), dtype=np.uint32)
    counters[..., 0] = (ids & 0xFFFFFFFF)[:, None, None]
    counters[..., 1] = (ids >> 32)[:, None, None]
    counters[..., 2] = np.reshape(epoch, (-1, 1, 1))
    counters[..., 3] = (stream << 16) + (np.arange(views)[:, None] << 8) + np.arange(blocks)
    return philox4x32(counters, seed_key(seed)).reshape(len(ids), views, blocks * 4)


def _between(uniform: NDArray[np.float64], low: NDArray | float, high: NDArray | float) -> NDArray[np.float64]:
    return low + (high - low) * uniform


def _draw_crops(
    recipe: ViewRecipe, draws: NDArray[np.float64], sizes: Int32[np.ndarray, "n 2"]
) -> Int32[np.ndarray, "n views 4"]:
    """torchvision's RandomResizedCrop: the first of ten attempts that fits, else the largest centre crop allowed."""
    image_height, image_width = (sizes[:, None, axis].astype(np.int64) for axis in range(2))  # [n, 1]
    smallest, largest = _per_view(recipe, "crop_scale").T[..., None]  # [views, 1]
    narrowest, widest = np.array([[*map(math.log, group.crop_ratio)] for group in recipe.per_view]).T[..., None]
    area = (image_height * image_width)[..., None] * _between(draws[..., AREAS], smallest, largest)
    aspect = np.exp(_between(draws[..., ASPECTS], narrowest, widest))
    widths = np.rint(np.sqrt(area * aspect)).astype(np.int64)  # [n, views, attempts]
    heights = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (widths > 0) & (widths <= image_width[..., None]) & (heights > 0) & (heights <= image_height[..., None])
    first = fits.argmax(axis=-1)[..., None]
    found = fits.any(axis=-1)
    largest_height, largest_width = _largest_crop(recipe, image_height, image_width)
    height = np.where(found, np.take_along_axis(heights, first, axis=-1)[..., 0], largest_height)
    width = np.where(found, np.take_along_axis(widths, first, axis=-1)[..., 0], largest_width)
    top = np.floor(draws[..., TOP] * (image_height - height + 1)).astype(np.int64)
    left = np.floor(draws[..., LEFT] * (image_width - width + 1)).astype(np.int64)
    top = np.where(found, top, (image_height - height) // 2)
    left = np.where(found, left, (image_width - width) // 2)
    return np.stack((top, left, height, width), axis=-1).astype(np.int32)


def _largest_crop(
    recipe: ViewRecipe, height: NDArray[np.int64], width: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The largest height and width ``[n, views]`` of an allowed aspect: torchvision's fallback for very long images."""
    narrowest, widest = _per_view(recipe, "crop_ratio").T  # [views]
    aspect = width / height
    too_tall, too_wide = aspect < narrowest, aspect > widest
    return (
        np.where(too_tall, np.rint(width / narrowest).astype(np.int64), height),
        np.where(too_wide, np.rint(height * widest).astype(np.int64), width),
    )
