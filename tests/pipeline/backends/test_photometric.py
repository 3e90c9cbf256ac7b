"""The compiled photometric stage against torchvision: operation by operation, the whole recipe, and at the edges."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.backends.photometric import Photometric
from pipeline.common.buffers import Buffers
from pipeline.sampling.views import CentreCrops, ViewParams, ViewRecipe, centre_crops, draw_views
from tests.helpers.crafted import BYTES, difference, referred, squares, transformed, view_params

KINDS = ["smooth", "noise", "constant"]
OPERATIONS = {
    "nothing": ({}, 0, 0.0),  # parameters; greatest and mean difference allowed, of 255
    "flip": ({"flip": True}, 0, 0.0),
    "brightness up": ({"jitter": True, "factors": [1.4, 1, 1, 0]}, 0, 0.0),
    "brightness to black": ({"jitter": True, "factors": [0, 1, 1, 0]}, 0, 0.0),
    "brightness doubled": ({"jitter": True, "factors": [2, 1, 1, 0]}, 0, 0.0),
    "contrast down": ({"jitter": True, "factors": [1, 0.6, 1, 0]}, 1, 0.02),
    "contrast gone": ({"jitter": True, "factors": [1, 0, 1, 0]}, 1, 0.02),
    "contrast doubled": ({"jitter": True, "factors": [1, 2, 1, 0]}, 1, 0.02),
    "saturation up": ({"jitter": True, "factors": [1, 1, 1.4, 0]}, 1, 0.06),
    "saturation gone": ({"jitter": True, "factors": [1, 1, 0, 0]}, 1, 0.02),
    "saturation doubled": ({"jitter": True, "factors": [1, 1, 2, 0]}, 1, 0.02),
    "hue forward": ({"jitter": True, "factors": [1, 1, 1, 0.1]}, 1, 0.02),
    "hue half a turn": ({"jitter": True, "factors": [1, 1, 1, 0.5]}, 1, 0.02),
    "hue half a turn back": ({"jitter": True, "factors": [1, 1, 1, -0.5]}, 1, 0.02),
    "hue by a third": ({"jitter": True, "factors": [1, 1, 1, 1 / 3]}, 1, 0.02),
    "gray": ({"gray": True}, 1, 0.01),
    "blur 0.1": ({"sigma": 0.1}, 0, 0.0),
    "blur 0.6": ({"sigma": 0.6}, 1, 0.01),
    "blur 2": ({"sigma": 2.0}, 1, 0.01),
    "solarize": ({"solarize": True}, 0, 0.0),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [2, 3, 5, 33, 64])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_operation(operation: str, side: int, kind: str) -> None:
    fields, greatest, mean = OPERATIONS[operation]
    images, params = squares(kind, 5, side), view_params(5, **fields)
    recipe = dataclasses.replace(BYTES, image_size=side)
    apart = difference(transformed(images, params, recipe), referred(images, params, recipe))
    assert apart.max() <= greatest + 1e-3
    assert apart.mean() <= mean + 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_all_orders_of_the_jitter(kind: str) -> None:
    orders = np.array(list(itertools.permutations(range(4))))
    images = squares(kind, 24, 33)
    params = view_params(24, jitter=True, order=orders, factors=[1.3, 0.7, 1.35, -0.08])
    ours = transformed(images, params)
    apart = difference(ours, referred(images, params))
    assert apart.mean() <= 0.02
    assert apart.max() <= 4
    if kind != "constant":  # and the order matters, so all that were tested are different
        fifth = transformed(images[:1].expand(24, -1, -1, -1).contiguous(), params)[0]
        assert len({image.numpy().tobytes() for image in fifth}) >= 20


def whole_recipe(kind: str, count: int, side: int, **fields: float) -> tuple[torch.Tensor, ViewParams, ViewRecipe]:
    recipe = ViewRecipe(image_size=side, **fields)
    sizes = np.tile(np.array([[side, side]], dtype=np.int32), (count, 1))
    return squares(kind, count, side), draw_views(recipe, 3, 0, np.arange(count), sizes), recipe


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("side", "count"), [(2, 60), (3, 60), (5, 60), (32, 60), (33, 60), (224, 6)])
def test_the_whole_recipe(kind: str, side: int, count: int) -> None:
    images, params, recipe = whole_recipe(kind, count, side, solarize_prob=0.2)
    apart = difference(transformed(images, params, recipe), referred(images, params, recipe), recipe)
    assert apart.mean() <= 0.02
    assert apart.max() <= 4


@settings(max_examples=60)
@given(
    pixels=st.binary(min_size=27, max_size=27),
    order=st.permutations(range(4)),
    factors=st.tuples(*[st.floats(0, 2)] * 3, st.floats(-0.5, 0.5)),
    gray=st.booleans(),
    sigma=st.sampled_from([0.0, 0.1, 0.5, 2.0]),
    solarize=st.booleans(),
    flip=st.booleans(),
)
def test_any_bytes_and_any_factors(
    pixels: bytes, order: list[int], factors: tuple[float, ...], gray: bool, sigma: float, solarize: bool, flip: bool
) -> None:
    """A step of rounding may grow in later operations, but only as far as these factors can stretch it."""
    image = torch.from_numpy(np.frombuffer(pixels, dtype=np.uint8).reshape(1, 3, 3, 3).copy())
    recipe = dataclasses.replace(BYTES, image_size=3)
    fields = {"jitter": True, "order": order, "gray": gray, "sigma": sigma, "solarize": False, "flip": flip}
    params = view_params(1, factors=factors, **fields)
    ours, theirs = transformed(image, params, recipe), referred(image, params, recipe)
    assert torch.stack(ours).isfinite().all()
    assert torch.stack(ours).min() >= 0
    assert torch.stack(ours).max() <= 255
    assert difference(ours, theirs, recipe).mean() <= 4
    if solarize:  # at the threshold, one step of rounding would turn black into white: apart, it is exact
        alone = view_params(1, solarize=True, flip=flip)
        assert difference(transformed(image, alone, recipe), referred(image, alone, recipe), recipe).max() < 1e-3


@pytest.mark.parametrize("threshold", [0, 1, 128, 255])
def test_solarize_at_any_threshold(threshold: int) -> None:
    recipe = dataclasses.replace(BYTES, solarize_threshold=threshold)
    images, params = squares("noise", 3, 16), view_params(3, solarize=True)
    assert difference(transformed(images, params, recipe), referred(images, params, recipe)).max() < 1e-3


@pytest.mark.parametrize(("side", "radius"), [(2, 11), (3, 11), (5, 11), (12, 11), (13, 11), (13, 1), (40, 11)])
def test_the_blurs_window_at_small_sides(side: int, radius: int) -> None:
    recipe = dataclasses.replace(BYTES, image_size=side, blur_radius=radius)
    for sigma in (0.1, 0.3, 1.0, 2.0):
        images, params = squares("noise", 4, side), view_params(4, sigma=sigma)
        apart = difference(transformed(images, params, recipe), referred(images, params, recipe))
        assert apart.max() <= 1 + 1e-3
        assert apart.mean() <= 0.02


def test_each_sample_and_view_gets_its_own_parameters() -> None:
    images, params, recipe = whole_recipe("smooth", 12, 16, solarize_prob=0.5)
    on_all_ranks = transformed(images, params, recipe)
    for sample in range(12):
        part = slice(sample, sample + 1)
        alone = ViewParams(**{f.name: getattr(params, f.name)[part] for f in dataclasses.fields(params)})
        for view in range(2):
            assert torch.equal(transformed(images[part], alone, recipe)[view], on_all_ranks[view][part])


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_change_nothing(threads: int) -> None:
    for count in (1, 2, 7, 33):
        images, params, recipe = whole_recipe("noise", count, 16)
        for one, other in zip(
            transformed(images, params, recipe), transformed(images, params, recipe, threads), strict=True
        ):
            assert torch.equal(one, other)


def test_views_are_channels_last_and_the_input_stays_as_it_was() -> None:
    images, params, recipe = whole_recipe("noise", 9, 16, solarize_prob=0.5)
    before = images.clone()
    for view in transformed(images, params, recipe):
        assert view.shape == (9, 3, 16, 16)
        assert view.dtype == torch.float32
        assert view.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types_are_the_rounded_wide_one(dtype: torch.dtype) -> None:
    from concurrent.futures import ThreadPoolExecutor

    images, params, recipe = whole_recipe("smooth", 5, 16)
    with ThreadPoolExecutor(1) as pool:
        narrow = Photometric(recipe, torch.device("cpu"), dtype, pool, 1)([images, images], params)
    for view, wide in zip(narrow, transformed(images, params, recipe), strict=True):
        assert view.dtype == dtype
        assert view.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(view, wide.to(dtype))


def test_centre_crops_are_only_normalised() -> None:
    from concurrent.futures import ThreadPoolExecutor

    images, recipe = squares("noise", 4, 32), ViewRecipe(image_size=32)
    crops: CentreCrops = centre_crops(32, np.full((4, 2), 32, dtype=np.int32))
    with ThreadPoolExecutor(1) as pool:
        (view,) = Photometric(recipe, torch.device("cpu"), torch.float32, pool, 1)([images], crops)
    expected = (images.permute(0, 3, 1, 2) / 255 - torch.tensor(recipe.mean)[:, None, None]) / torch.tensor(recipe.std)[
        :, None, None
    ]
    torch.testing.assert_close(view, expected, rtol=0, atol=1e-5)


def test_lent_memory_comes_back_only_when_nothing_looks_at_it() -> None:
    buffers = Buffers(torch.float32)
    first = buffers.lend((2, 8))
    first.fill_(1)
    glance, array = first[1:], first.numpy()
    del first
    second = buffers.lend((2, 8))
    second.fill_(2)
    assert (glance == 1).all()
    assert (array == 1).all()
    del glance
    buffers.lend((16,)).fill_(3)
    assert (array == 1).all()
    address = array.__array_interface__["data"][0]
    del array
    third, fourth = buffers.lend((4, 4)), buffers.lend((4, 4))
    assert address in (third.data_ptr(), fourth.data_ptr())
    assert len({second.data_ptr(), third.data_ptr(), fourth.data_ptr()}) == 3
