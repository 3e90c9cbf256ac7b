"""The views through PIL and torchvision: slow and plain, the oracle that the fast back ends are tested against.

The torchvision back end, for machines without DALI, is made of these functions. Each takes and returns one
image: uint8 ``[3, h, w]``, RGB; or of a dataset of --channels, float32 ``[c, h, w]`` of 0 .. 1.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from pipeline.common.arrays import is_array, read_array
from pipeline.common.png import without_text
from pipeline.sampling.augmentations import augment, augment_bytes
from pipeline.sampling.views import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    CentreCrops,
    Interpolation,
    ViewParams,
    ViewRecipe,
)

DecodedImage = UInt8[Tensor, "3 h w"] | Float32[Tensor, "c h w"]
Square = UInt8[Tensor, "3 s s"] | Float32[Tensor, "c s s"]
# PIL stops at 179 million pixels with an error of a class of its own. Images too large were refused when sharded; the
# limit here is for bytes that came into a shard in another way.
Image.MAX_IMAGE_PIXELS = None
MAX_PIXELS = 1 << 28  # 1 GB decoded


def decode(encoded: bytes) -> DecodedImage:
    """Decode an encoded image as PIL does; EXIF orientation is ignored, 16 bits are scaled to 8.

    The arrays of a dataset of --channels become float32, scaled to 0 .. 1 by the range of their type. Raises OSError,
    ValueError or SyntaxError, as PIL does, when the bytes are no whole image.
    """
    if is_array(encoded):
        values = read_array(encoded)
        scaled = values.astype(np.float32) / np.float32(np.iinfo(values.dtype).max)
        return torch.from_numpy(scaled).permute(2, 0, 1).contiguous()
    with Image.open(io.BytesIO(without_text(encoded))) as file:
        image: Image.Image = file
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
        if image.mode.startswith("I"):  # 16 bits, in 32 for PPM; PIL's own conversion would clip at 255, not scale
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def resized_crop(
    image: DecodedImage,
    params: ViewParams,
    sample: int,
    view: int,
    image_size: int,
    interpolation: Interpolation = "bilinear",
) -> Square:
    """The view's window, resized to a square of ``image_size`` px. Raises ValueError if the image is smaller."""
    top, left, height, width = params.crop[sample, view].tolist()
    check_inside(image, top + height, left + width)
    mode, size = InterpolationMode(interpolation), [image_size, image_size]
    return F.resized_crop(image, top, left, height, width, size, mode, antialias=True)


def centre_crop(image: DecodedImage, crops: CentreCrops, sample: int, image_size: int) -> Square:
    """The evaluation view: the image resized, then its centre. Raises ValueError if the image is smaller."""
    check_inside(image, *np.rint(crops.end[sample]).astype(int).tolist())
    resized = F.resize(image, crops.resized[sample].tolist(), antialias=True)
    top, left = crops.corner[sample].tolist()
    return F.crop(resized, top, left, image_size, image_size)


def check_inside(image: DecodedImage, bottom: int, right: int) -> None:
    """Raise ValueError if the image is smaller: torchvision would fill up with black what lies beyond it."""
    height, width = image.shape[1:]
    if bottom > height or right > width:
        raise ValueError(f"the image has {height} x {width} pixels, less than samples.npy says")


def change_bytes(image: Square, params: ViewParams, sample: int, view: int, recipe: ViewRecipe) -> Square:
    """What goes beyond the paper's recipe and acts on bytes: it comes before the colours."""
    if image.is_floating_point():  # of a dataset of --channels, whose recipe has none of them
        return image
    return augment_bytes(image[None].clone(), params.extra[sample : sample + 1, view], recipe.extra)[0]


def colour(image: DecodedImage, params: ViewParams, sample: int, view: int) -> DecodedImage:
    """The four operations of ColorJitter in their drawn order, then grayscale."""
    if params.jitter[sample, view]:
        for operation in params.order[sample, view]:
            factor = float(params.factors[sample, view, operation])
            match operation:
                case _ if operation == BRIGHTNESS:
                    image = F.adjust_brightness(image, factor)
                case _ if operation == CONTRAST:
                    image = F.adjust_contrast(image, factor)
                case _ if operation == SATURATION:
                    image = F.adjust_saturation(image, factor)
                case _ if operation == HUE:
                    image = F.adjust_hue(image, factor)
                case _:
                    raise AssertionError(f"no colour operation {operation}")
    if params.gray[sample, view]:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    return image


def blur_and_flip(image: DecodedImage, params: ViewParams, sample: int, view: int, recipe: ViewRecipe) -> DecodedImage:
    """What follows the colours: blur, solarize, flip."""
    recipe = recipe.per_view[view]
    if params.sigma[sample, view] > 0:
        window = recipe.blur_window
        image = F.gaussian_blur(image, [window, window], [float(params.sigma[sample, view])] * 2)
    if params.solarize[sample, view]:
        image = F.solarize(image, recipe.solarize_threshold)
    if params.flip[sample, view]:
        image = F.horizontal_flip(image)
    return image


def transform(image: DecodedImage, params: ViewParams, sample: int, view: int, recipe: ViewRecipe) -> Square:
    """One view of a decoded image, before it is normalised."""
    own = recipe.per_view[view]
    cropped = resized_crop(image, params, sample, view, own.image_size, own.interpolation)
    changed = change_bytes(cropped, params, sample, view, recipe)
    return blur_and_flip(colour(changed, params, sample, view), params, sample, view, recipe)


def normalise(image: DecodedImage, recipe: ViewRecipe) -> Float32[Tensor, "c h w"]:
    """Bytes to float32: scaled to 0 .. 1, less the mean, by the standard deviation."""
    return F.normalize(F.to_dtype(image, torch.float32, scale=True), list(recipe.mean), list(recipe.std))


def finish(
    image: DecodedImage, params: ViewParams, sample: int, view: int, recipe: ViewRecipe
) -> Float32[Tensor, "c h w"]:
    """What follows ``transform``: normalise, and apply what goes beyond the paper's recipe."""
    return augment(normalise(image, recipe)[None], params.extra[sample : sample + 1, view], recipe.extra)[0]
