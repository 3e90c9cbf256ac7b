"""The oracle itself: what PIL decodes, in which order operations come, and what counts as undecodable."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from pipeline.backends import reference
from pipeline.backends import torchvision_backend as torchvision_backend_module
from pipeline.backends.base import UndecodableBatchError
from pipeline.sampling.views import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewRecipe
from tests.helpers.crafted import view_params
from tests.helpers.encoded import HEIGHT, WIDTH, bad_images, batch_of, good_images, gray16, only_pil_decodes


@pytest.mark.parametrize("kind", good_images() | only_pil_decodes())
def test_images_decode_as_pil_converts_them(kind: str) -> None:
    encoded = (good_images() | only_pil_decodes())[kind]
    image = reference.decode(encoded)
    assert image.shape == (3, HEIGHT, WIDTH)  # as stored: EXIF turns nothing
    assert image.is_contiguous()
    if kind in ("gray PNG of 16 bits", "gray TIFF of 16 bits", "PGM of 16 bits"):
        expected = np.repeat((gray16() >> 8).astype(np.uint8)[..., None], 3, axis=-1)
    else:
        expected = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("kind", bad_images())
def test_no_image_is_an_error(kind: str) -> None:
    with pytest.raises((OSError, ValueError, SyntaxError)):
        reference.decode(bad_images()[kind])


def test_large_images_are_not_refused() -> None:
    """PIL's own limit of 179 million pixels raises an error of no usual class; sharding has checked the size."""
    assert Image.MAX_IMAGE_PIXELS is None


def test_operations_come_in_the_drawn_order() -> None:
    image = reference.decode(good_images()["JPEG"])
    factors = {BRIGHTNESS: 1.3, CONTRAST: 0.7, SATURATION: 1.4, HUE: 0.1}
    listed = [factors[operation] for operation in range(4)]
    params = view_params(1, jitter=True, order=[HUE, CONTRAST, BRIGHTNESS, SATURATION], factors=listed)
    expected = F.adjust_hue(image, 0.1)
    expected = F.adjust_contrast(expected, 0.7)
    expected = F.adjust_brightness(expected, 1.3)
    expected = F.adjust_saturation(expected, 1.4)
    coloured = reference.colour(image, params, 0, 0)
    assert (coloured.int() - expected.int()).abs().max() <= 1  # factors travel as float32
    other = view_params(1, jitter=True, order=[CONTRAST, BRIGHTNESS, SATURATION, HUE], factors=listed)
    assert (coloured.int() - reference.colour(image, other, 0, 0).int()).abs().max() > 4


def test_gray_follows_the_jitter_and_flip_comes_last() -> None:
    image = reference.decode(good_images()["JPEG"])
    recipe = ViewRecipe(image_size=32)
    params = view_params(
        1, crop=[3, 5, 40, 50], jitter=True, factors=[1.2, 1, 1, 0], gray=True, sigma=1.5, solarize=True, flip=True
    )
    expected = F.resized_crop(image, 3, 5, 40, 50, [32, 32], antialias=True)
    expected = F.rgb_to_grayscale(F.adjust_brightness(expected, float(np.float32(1.2))), num_output_channels=3)
    expected = F.horizontal_flip(F.solarize(F.gaussian_blur(expected, [23, 23], [1.5, 1.5]), 128))
    for view in range(2):
        assert torch.equal(reference.transform(image, params, 0, view, recipe), expected)


def test_normalise_is_the_formula() -> None:
    recipe = ViewRecipe()
    image = reference.decode(good_images()["PNG"])
    mean, std = (torch.tensor(value)[:, None, None] for value in (recipe.mean, recipe.std))
    torch.testing.assert_close(reference.normalise(image, recipe), (image / 255 - mean) / std, rtol=0, atol=1e-5)


@pytest.mark.parametrize("centre", [False, True])
def test_a_bad_image_costs_its_batch_only(centre: bool) -> None:
    recipe, good = ViewRecipe(image_size=16), good_images()["JPEG"]
    lists = [[good] * 3, [good, bad_images()["text"], good], [good] * 2]
    batches = [batch_of(encoded, recipe, step=step, centre=centre) for step, encoded in enumerate(lists)]
    with ThreadPoolExecutor(2) as pool:
        views = torchvision_backend_module.TorchvisionViews(
            iter(batches), recipe, pool, torch.device("cpu"), torch.float32
        )
        first = next(views)
        with pytest.raises(UndecodableBatchError) as caught:
            next(views)
        last = next(views)
        assert next(views, None) is None
    assert (first.step, caught.value.batch.step, last.step) == (0, 1, 2)
    assert len(last.views) == (1 if centre else 2)
    for view in last.views:
        assert view.shape == (2, 3, 16, 16)
        assert view.is_contiguous(memory_format=torch.channels_last)
