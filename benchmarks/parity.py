"""How far DALI's views are from torchvision's, operation by operation: python benchmarks/parity.py DATASET

Decoding, cutting and the whole recipe start from the encoded images. Colour operations, blur, solarize and flip start
from the reference's crops and are applied to every image, so that each line shows one operation alone. Differences
are in steps of 0 .. 255; the parameters are drawn as in training. With `--more-views` crops
and the whole recipe have a line for each group. `--against pil` compares with the transforms of the
paper's code instead, which work on PIL images: its colours and its blur are others (facebookresearch/simsiam).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from jaxtyping import Float, UInt8
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from pipeline.backends import reference
from pipeline.backends.base import BackendContext, Batch, DaliConfig
from pipeline.backends.photometric import Photometric
from pipeline.backends.select import choose_backend
from pipeline.common.errors import UserError, exit_on_user_error
from pipeline.common.locations import InputPath, LocalPath
from pipeline.common.system import share_of_cores
from pipeline.dataset.dataset import ShardSet
from pipeline.sampling.views import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    CentreCrops,
    Interpolation,
    ViewParams,
    ViewRecipe,
    centre_crops,
    draw_views,
)
from tools.common.measuring import describe_machine

BATCH = 20  # images at a time
CLOSE = 4  # of 255; the last column counts differences up to it


@dataclass(frozen=True)
class Config:
    """Flags of parity.py."""

    data: Annotated[InputPath, tyro.conf.Positional]
    """Dataset folder of make_shards.py."""
    samples: int = 200
    """Largest number of images."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device of DALI."""
    seed: int = 0
    """Seed of the views."""
    against: Literal["torchvision", "pil"] = "torchvision"
    """Reference: torchvision's transforms of tensors, or those of PIL images as in the paper's code."""
    markdown: LocalPath | None = None
    """Write the table to this file."""
    views: Annotated[ViewRecipe, tyro.conf.arg(name="")] = field(default_factory=ViewRecipe)


@dataclass
class Difference:
    """Absolute differences so far, of 255."""

    greatest: float = 0.0
    total: float = 0.0
    close: int = 0
    values: int = 0

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        """Count two tensors of the same shape, in steps of 0 .. 255."""
        apart = (ours.cpu().float() - theirs.float()).abs()
        self.greatest = max(self.greatest, apart.max().item())
        self.total += apart.sum(dtype=torch.float64).item()
        self.close += int((apart <= CLOSE + 1e-3).sum())
        self.values += apart.numel()

    def row(self, name: str) -> str:
        if not self.values:
            return f"| {name} | no image is large enough | | |"
        mean, share = self.total / self.values, 100 * self.close / self.values
        return f"| {name} | {self.greatest:.0f} | {mean:.4f} | {share:.4f} % |"


@dataclass(frozen=True)
class Photos:
    """Some images, encoded and decoded by PIL."""

    ids: np.ndarray
    encoded: list[np.ndarray]
    decoded: list[UInt8[Tensor, "3 h w"]]
    sizes: np.ndarray

    def batch(self, windows: ViewParams | CentreCrops) -> Batch:
        """The images as input of a back end."""
        return Batch(0, 0, self.ids, self.ids, self.encoded, windows)

    def only(self, keep: np.ndarray) -> Photos:
        """The images at the positions ``keep``."""
        return Photos(
            self.ids[keep], [self.encoded[i] for i in keep], [self.decoded[i] for i in keep], self.sizes[keep]
        )


class PilTransforms:
    """The functions of pipeline/backends/reference.py on PIL images, with PIL's Gaussian blur: the paper's code."""

    @staticmethod
    def resized_crop(
        image: Tensor, params: ViewParams, sample: int, view: int, side: int, interpolation: Interpolation
    ) -> Tensor:
        """Cut by torchvision, resized by PIL."""
        top, left, height, width = params.crop[sample, view].tolist()
        mode = InterpolationMode(interpolation)
        return _pil_to_bytes(F.resized_crop(_pil(image), top, left, height, width, [side, side], mode))

    @staticmethod
    def centre_crop(image: Tensor, crops: CentreCrops, sample: int, side: int) -> Tensor:
        """The evaluation view, resized by PIL."""
        resized = F.resize(_pil(image), crops.resized[sample].tolist())
        top, left = crops.corner[sample].tolist()
        return _pil_to_bytes(F.crop(resized, top, left, side, side))

    @staticmethod
    def colour(image: Tensor, params: ViewParams, sample: int, view: int) -> Tensor:
        """ColorJitter of a PIL image in the drawn order, then grayscale."""
        adjust = {
            BRIGHTNESS: F.adjust_brightness,
            CONTRAST: F.adjust_contrast,
            SATURATION: F.adjust_saturation,
            HUE: F.adjust_hue,
        }
        edited = _pil(image)
        if params.jitter[sample, view]:
            for operation in params.order[sample, view].tolist():
                edited = adjust[operation](edited, float(params.factors[sample, view, operation]))
        if params.gray[sample, view]:
            edited = F.rgb_to_grayscale(edited, num_output_channels=3)
        return _pil_to_bytes(edited)

    @staticmethod
    def blur_and_flip(image: Tensor, params: ViewParams, sample: int, view: int, recipe: ViewRecipe) -> Tensor:
        """PIL's blur, whose radius is the standard deviation; solarize, flip."""
        edited = _pil(image)
        if params.sigma[sample, view] > 0:
            edited = edited.filter(ImageFilter.GaussianBlur(radius=float(params.sigma[sample, view])))
        if params.solarize[sample, view]:
            edited = F.solarize(edited, recipe.solarize_threshold)
        return _pil_to_bytes(F.horizontal_flip(edited) if params.flip[sample, view] else edited)

    @staticmethod
    def transform(image: Tensor, params: ViewParams, sample: int, view: int, recipe: ViewRecipe) -> Tensor:
        own = recipe.per_view[view]
        cropped = PilTransforms.resized_crop(image, params, sample, view, own.image_size, own.interpolation)
        coloured = PilTransforms.colour(cropped, params, sample, view)
        return PilTransforms.blur_and_flip(coloured, params, sample, view, recipe)


def _pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def _pil_to_bytes(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Parity:
    """Compares the operations on one device."""

    def __init__(self, config: Config, pool: ThreadPoolExecutor, threads: int) -> None:
        """``pool`` has ``threads`` workers."""
        self._config = config
        self._pool = pool
        self._threads = threads
        self._device = torch.device(config.device)
        self._theirs: Any = PilTransforms if config.against == "pil" else reference
        self._recipe = config.views
        self._names = [_of_group(config.views, own) for own in config.views.per_view]  # suffix of each view's rows
        none = dict.fromkeys(("flip_prob", "jitter_prob", "gray_prob", "blur_prob", "solarize_prob"), 0.0)
        still = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0)
        plain = dataclasses.replace(self._recipe, more_views=(), **none)  # type: ignore[arg-type]
        self._operations = {
            **{
                name: dataclasses.replace(plain, **{**still, name: getattr(plain, name)}, jitter_prob=1.0)
                for name in still
            },
            "whole jitter, random order": dataclasses.replace(plain, jitter_prob=1.0),
            "grayscale": dataclasses.replace(plain, gray_prob=1.0),
            "blur": dataclasses.replace(plain, blur_prob=1.0),
            "solarize": dataclasses.replace(plain, solarize_prob=1.0),
            "flip": dataclasses.replace(plain, flip_prob=1.0),
        }
        crops, wholes = ([f"{name}{group}" for group in self._names] for name in ("crop and resize", "whole recipe"))
        self.results = {name: Difference() for name in ("decode", *crops, "centre crop", *self._operations, *wholes)}

    def measure(self, photos: Photos) -> None:
        """Compare every operation on some images."""
        side = self._recipe.image_size
        large = np.flatnonzero(photos.sizes.min(axis=1) >= side)
        if len(large):
            self._decode(photos.only(large))
        params = self._draw(self._recipe, photos)
        cropped = self._refer(photos, lambda image, i, view: self._resized_crop(image, params, i, view))
        for group, ours, theirs in zip(self._names, self._squares(photos.batch(params)), cropped, strict=True):
            self.results[f"crop and resize{group}"].add(ours, theirs)
        crops = centre_crops(side, photos.sizes)
        centre = [self._theirs.centre_crop(image, crops, i, side) for i, image in enumerate(photos.decoded)]
        self.results["centre crop"].add(self._squares(photos.batch(crops))[0], _interleaved(centre))
        for name, recipe in self._operations.items():
            self._photometric(self.results[name], recipe, cropped[: recipe.count], self._draw(recipe, photos))
        self._whole(photos, params)

    def _draw(self, recipe: ViewRecipe, photos: Photos) -> ViewParams:
        return draw_views(recipe, self._config.seed, 0, photos.ids, photos.sizes)

    def _resized_crop(self, image: Tensor, params: ViewParams, sample: int, view: int) -> Tensor:
        own = self._recipe.per_view[view]
        return self._theirs.resized_crop(image, params, sample, view, own.image_size, own.interpolation)

    def _decode(self, photos: Photos) -> None:
        """Two corners of each image, each of a view's size, so that nothing is resized."""
        side, recipe = self._recipe.image_size, dataclasses.replace(self._recipe, count=2, more_views=())
        params = self._draw(recipe, photos)
        params.crop[:, 0, :2] = 0
        params.crop[:, 1, :2] = photos.sizes - side
        params.crop[..., 2:] = side
        for view, ours in enumerate(self._squares(photos.batch(params), recipe)):
            corners = [
                image[:, top : top + side, left : left + side]
                for image, (top, left) in zip(photos.decoded, params.crop[:, view, :2].tolist(), strict=True)
            ]
            self.results["decode"].add(ours, _interleaved(corners))

    def _photometric(
        self, result: Difference, recipe: ViewRecipe, squares: list[UInt8[Tensor, "n _ _ 3"]], params: ViewParams
    ) -> None:
        views = self._transform(recipe, [square.to(self._device) for square in squares], params)
        for view, (ours, square) in enumerate(zip(views, squares, strict=True)):
            theirs = list(
                self._pool.map(
                    lambda i, view=view, square=square: self._theirs.blur_and_flip(
                        self._theirs.colour(square[i].permute(2, 0, 1), params, i, view), params, i, view, recipe
                    ),
                    range(len(square)),
                )
            )
            result.add(ours, torch.stack(theirs))

    def _whole(self, photos: Photos, params: ViewParams) -> None:
        views = self._transform(self._recipe, self._squares(photos.batch(params)), params)
        made = self._refer(photos, lambda image, i, view: self._theirs.transform(image, params, i, view, self._recipe))
        for group, ours, theirs in zip(self._names, views, made, strict=True):
            self.results[f"whole recipe{group}"].add(ours, theirs.permute(0, 3, 1, 2))

    def _squares(self, batch: Batch, recipe: ViewRecipe | None = None) -> list[UInt8[Tensor, "n _ _ 3"]]:
        from pipeline.backends.dali_backend import cut_squares

        device, pool = self._device, self._pool
        context = BackendContext(
            recipe or self._recipe, DaliConfig(), len(batch), device, torch.float32, pool, self._threads
        )
        return next(cut_squares(context, iter([batch])))[1]

    def _transform(
        self, recipe: ViewRecipe, squares: list[UInt8[Tensor, "n _ _ 3"]], params: ViewParams
    ) -> list[Float[Tensor, "n 3 _ _"]]:
        """Views as bytes: normalised with a mean of 0 and a deviation of one step."""
        bytewise = dataclasses.replace(recipe, mean=(0.0, 0.0, 0.0), std=(1 / 255,) * 3)
        return Photometric(bytewise, self._device, torch.float32, self._pool, self._threads)(squares, params)

    def _refer(
        self, photos: Photos, make: Callable[[Tensor, int, int], UInt8[Tensor, "3 s s"]]
    ) -> list[UInt8[Tensor, "n _ _ 3"]]:
        """All views by the reference, ``make(image, sample, view)`` each."""
        samples = range(len(photos.ids))
        return [
            _interleaved(list(self._pool.map(lambda i, view=view: make(photos.decoded[i], i, view), samples)))
            for view in range(len(self._recipe.per_view))
        ]


def _of_group(recipe: ViewRecipe, own: ViewRecipe) -> str:
    """What tells a group's rows apart; nothing where there is one group."""
    return f", {own.count} x {own.image_size} px, {own.interpolation}" if recipe.more_views else ""


def _interleaved(images: list[UInt8[Tensor, "3 s s"]]) -> UInt8[Tensor, "n s s 3"]:
    return torch.stack(images).permute(0, 2, 3, 1).contiguous()


def photos_of(dataset: ShardSet, samples: int) -> Iterator[Photos]:
    """The first samples of a dataset, a batch at a time."""
    for start in range(0, samples, BATCH):
        ids = np.arange(start, min(start + BATCH, samples), dtype=np.int64)
        encoded = [dataset.read(int(sample)) for sample in ids]
        yield Photos(
            ids,
            [np.frombuffer(data, dtype=np.uint8) for data in encoded],
            [reference.decode(data) for data in encoded],
            dataset.sizes(ids),
        )


def main() -> None:
    """The command."""
    config = tyro.cli(Config, description=__doc__)
    choose_backend("dali")
    if config.samples < 1:
        raise UserError(f"--samples {config.samples}: at least 1 image must be compared")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no NVIDIA GPU that torch can use; take --device cpu")
    dataset = ShardSet.open(config.data)
    samples, threads = min(config.samples, dataset.num_samples), share_of_cores(1)
    with ThreadPoolExecutor(threads) as pool:
        parity = Parity(config, pool, threads)
        for photos in tqdm(photos_of(dataset, samples), total=-(-samples // BATCH), desc="batches", leave=False):
            parity.measure(photos)
    table = "\n".join(
        [
            f"{samples} images, {len(config.views.per_view)} views each, the first of {config.views.image_size} px, "
            f"DALI on {config.device}; "
            f"reference: {config.against}",
            "",
            f"| stage | max of 255 | mean of 255 | within {CLOSE} |",
            "|---|---|---|---|",
            *(result.row(name) for name, result in parity.results.items()),
            "",
            *(f"{line}  " for line in describe_machine().splitlines()),
        ]
    )
    print(table)
    if config.markdown is not None:
        config.markdown.write_text(table + "\n")


if __name__ == "__main__":
    exit_on_user_error(main)
