"""The options of make_shards.py: those that decide the bytes of a dataset, and those that only schedule the work.

``recipe()`` gives the first kind for dataset.json; an interrupted run continues only with an equal recipe.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pipeline.common.errors import UserError, require
from pipeline.common.locations import InputPath, PathText
from pipeline.sources.image_file import Verify
from pipeline.sources.sixteen_bit import SixteenBitRule

MAX_CHANNELS = 1024  # hyperspectral cameras have a few hundred
_SCHEDULING = ("workers", "part", "overwrite", "index_only")  # all other options decide the bytes


@dataclass(frozen=True)
class ShardingOptions:
    """Options of one call of ``make_dataset``. Raises UserError for values outside their range."""

    samples_per_shard: int = 2048
    """Images in one tar; 2048 ImageNet images are about 225 MB, the size WebDataset recommends."""
    workers: int = 0
    """Worker processes; 0 = one per CPU core. The result does not depend on it."""
    seed: int = 0
    """Seed of the global shuffle (and of the images of synthetic:N)."""
    shuffle: Literal["draws", "permutation"] = "draws"
    """How to shuffle the images over all shards. draws: sort random numbers, in 16 bytes of memory an image.
    permutation: compute each shard's part of a keyed permutation, for hundreds of millions of images."""
    verify: Verify = "full"
    """How far to check images. full: decode every image and refuse the broken ones; those other than JPEGs of 1 or 3
    components with every back end that is installed, and refuse what differs. header: refuse by format and size only.
    none: the same as header, since height and width must be known."""
    sixteen_bit: SixteenBitRule = "auto"
    """Map images of more than 8 bits a sample to 8 bits, stored as PNG. full-range: the whole range of the format.
    min-max: from each image's smallest to its largest value. window LO HI: these values, as in --sixteen-bit window 0
    4095. refuse: refuse such images. auto: full-range, but refuse images whose values span less than half of it."""
    sixteen_bit_window: tuple[int, int] | None = None
    """The window of --sixteen-bit window: the values that become 0 and 255, in the unit of the images."""
    reencode: bool = False
    """Store images that back ends do not decode alike as PNGs of the pixels that PIL decodes, instead of refusing
    them. reencoded.jsonl lists them."""
    channels: int | None = None
    """Take images of this many channels, other than 3, from a folder: .npy of uint8 or uint16, TIFF with several bands
    (pip install 'siamstream[tiff]'); for 1 also gray PNG, TIFF, JPEG. All values are kept, 16 bits too unless
    --sixteen-bit maps them to 8; mean and std are measured. Default: colour and gray images, as 8-bit RGB."""
    max_pixels: int = 100_000_000
    """Images with more pixels (height x width) are refused before they are decoded."""
    shorter_side: int | None = None
    """Re-encode images with a longer shorter side as JPEGs whose shorter side has this many pixels. Default: keep all
    bytes."""
    jpeg_quality: int = 90
    """Quality (1 to 100) of images re-encoded by --shorter-side."""
    limit: int | None = None
    """Take only this many images, drawn by the seed. Default: all."""
    subtree: str = ""
    """Use only this folder of SOURCE, as in --subtree train; its sub-folders are the classes. For parquet files: use
    only those whose names begin with this."""
    labels: PathText = "auto"
    """Source of the labels. auto: class folders or a label column if there are any. folders: class folders, required.
    none: no labels. Or a FILE: CSV or other lines of `name,class`, for all images or some; a class per line in the
    order of the sorted image names; or ImageNet's devkit archive."""
    label_column: str | None = None
    """Column with the class in the FILE of --labels or in parquet files, by name or by number from 1 on. Default: the
    one called label, class, target or category."""
    image_column: str | None = None
    """Column with the images in parquet files. Default: found by type and name; the summary says which."""
    wds_image_ext: str | None = None
    """Extension of the image in wds: samples that have several, as in --wds-image-ext left.jpg; "a.jpg;b.jpg" takes the
    first that a sample has. Default: the plainest, jpg rather than depth.png."""
    wds_label_key: str | None = None
    """Take labels of wds: samples from this key of their .json; a.b is key b inside a. Default: from their .cls."""
    index_only: bool = False
    """Refuse a SOURCE that is copied: only wds: tars, on a disk or behind a URL, stay where they are."""
    classes_from: InputPath | None = None
    """Use the class list of this dataset, so that the labels of a validation set agree with its training set."""
    split: str | None = None
    """Record this name in dataset.json, as in --split train. Of parquet files of several splits, take this one, or
    several, as in --split train+test."""
    hold_out: float | None = None
    """Hold this share of each class out, such as 0.1, as a second dataset OUT-val for validation. Near-duplicates (by
    the difference hash of thumbnails) stay on one side. Default: hold nothing out."""
    part: str | None = None
    """Part of the work, written i/n: build only part i of n (i from 0 to n - 1), for machines that share OUT; the last
    one to end completes the dataset."""
    overwrite: bool = False
    """Delete the complete or unfinished dataset in OUT and write it again."""
    side: Annotated[Literal["train", "val"] | None, tyro.conf.Suppress] = None
    """Which side of --hold-out this dataset is; make_dataset sets it."""

    def __post_init__(self) -> None:
        for name in ("samples_per_shard", "max_pixels", "shorter_side", "limit"):
            value = getattr(self, name)
            require(f"--{name.replace('_', '-')}", value, value is None or value >= 1, "must be at least 1")
        require("--workers", self.workers, self.workers >= 0, "must be at least 1, or 0 for one per CPU core")
        require("--seed", self.seed, self.seed >= 0, "must not be negative")
        require("--jpeg-quality", self.jpeg_quality, 1 <= self.jpeg_quality <= 100, "must be 1 to 100")
        self._check_window()
        if self.overwrite and self.part is not None:
            raise UserError(
                "--overwrite with --part: each part would delete what the others wrote; delete OUT yourself, then "
                "start all parts without --overwrite"
            )
        self.part_of()
        if self.hold_out is not None:
            share = self.hold_out
            require("--hold-out", share, 0 < share < 1, "a share lies between 0 and 1, as in --hold-out 0.1")
            if self.shuffle == "permutation":
                raise UserError(
                    "--shuffle permutation does not go with --hold-out, which compares all images in memory"
                )
            if self.part is not None:
                raise UserError("--part does not go with --hold-out, which compares all images: leave one of them out")

        self._check_channels()

    def _check_channels(self) -> None:
        channels = self.channels
        if channels is None:
            return
        rule = f"it is 1 to {MAX_CHANNELS} but not 3, which make_shards takes without the flag"
        require("--channels", channels, 1 <= channels <= MAX_CHANNELS and channels != 3, rule)
        others = {
            "--shorter-side": self.shorter_side is not None,
            "--hold-out": self.hold_out is not None,
            "--reencode": self.reencode,
        }
        if named := [flag for flag, is_set in others.items() if is_set]:
            raise UserError(f"{named[0]} does not go with --channels {channels}: leave one of them out")

    def _check_window(self) -> None:
        window = self.sixteen_bit_window
        if (self.sixteen_bit == "window") != (window is not None):
            raise UserError("--sixteen-bit window needs two values, and only window does: --sixteen-bit window 0 4095")
        if window is not None and not 0 <= window[0] < window[1] <= 65535:
            raise UserError(f"--sixteen-bit window {window[0]} {window[1]}: must be 0 <= LO < HI <= 65535")

    def sixteen_bit_text(self) -> str:
        """The rule that maps more than 8 bits to 8, for lists of images."""
        match self.sixteen_bit, self.sixteen_bit_window:
            case "auto", _:
                return "full-range"
            case rule, None:
                return rule
            case rule, (low, high):
                return f"{rule} {low} {high}"

    def part_of(self) -> tuple[int, int]:
        """(i, n) of --part i/n; (0, 1) without it. Raises UserError if it is malformed."""
        if self.part is None:
            return 0, 1
        match = re.fullmatch(r"(\d{1,15})/(\d{1,15})", self.part)
        if match is None or not int(match[1]) < int(match[2]):
            raise UserError(f"--part {self.part}: must be i/n with i from 0 to n - 1, as in 0/4 to 3/4")
        return int(match[1]), int(match[2])

    def recipe(self) -> dict[str, Any]:
        """The options that decide the dataset's bytes, for dataset.json. Paths are reduced to their base names, which
        are equal on every machine.
        """
        values = {name: value for name, value in asdict(self).items() if name not in _SCHEDULING}
        values["labels"] = Path(self.labels).name
        values["classes_from"] = None if self.classes_from is None else self.classes_from.resolve().name
        values["subtree"] = self.subtree.strip("/")
        if self.shorter_side is None:
            values["jpeg_quality"] = None
        if self.shuffle == "draws":
            del values["shuffle"]  # as datasets had it before there was the option
        if self.channels is None:
            del values["channels"]  # likewise
        if self.hold_out is None:
            del values["hold_out"], values["side"]  # as datasets had it before there was the option
        return values
