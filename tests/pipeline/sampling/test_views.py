"""The draw of the views: a pure function of a sample's own row, distributed as torchvision draws it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import CenterCrop, Compose, Resize

from pipeline.backends import reference
from pipeline.common.errors import UserError
from pipeline.sampling.augmentations import Augmentations, Erasing
from pipeline.sampling.views import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    JITTER_ORDERS,
    SATURATION,
    ViewGroup,
    ViewParams,
    ViewRecipe,
    centre_crops,
    draw_views,
    parse_group,
)
from tests.helpers.chance import Z_LIMIT, chi_square_z, kolmogorov_smirnov

RECIPE = ViewRecipe(solarize_prob=0.3)
FIELDS = [field.name for field in dataclasses.fields(ViewParams)]
SIDE = st.integers(1, 65535)
DRAWS = 3000


def draw(ids: list[int] | np.ndarray, size: tuple[int, int] = (300, 400), seed: int = 0, epoch: int = 0) -> ViewParams:
    ids = np.asarray(ids, dtype=np.int64)
    return draw_views(RECIPE, seed, epoch, ids, np.tile(np.array([size], dtype=np.int32), (len(ids), 1)))


def assert_same(one: ViewParams, other: ViewParams) -> None:
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


ROWS = st.lists(st.tuples(st.integers(0, 2**62), SIDE, SIDE), min_size=1, max_size=20)


@given(rows=ROWS, seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**32 - 1), data=st.data())
def test_a_draw_does_not_depend_on_the_batch(
    rows: list[tuple[int, int, int]], seed: int, epoch: int, data: st.DataObject
) -> None:
    ids = np.array([row[0] for row in rows], dtype=np.int64)
    sizes = np.array([row[1:] for row in rows], dtype=np.int32)
    on_all_ranks = draw_views(RECIPE, seed, epoch, ids, sizes)
    picked = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=8))
    apart = draw_views(RECIPE, seed, epoch, ids[picked], sizes[picked])
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(apart, name), getattr(on_all_ranks, name)[picked], err_msg=name)


@given(rows=ROWS, seed=st.integers(0, 2**64 - 1))
def test_windows_lie_inside_the_image_and_factors_in_their_range(rows: list[tuple[int, int, int]], seed: int) -> None:
    ids = np.array([row[0] for row in rows], dtype=np.int64)
    sizes = np.array([row[1:] for row in rows], dtype=np.int32)
    params = draw_views(RECIPE, seed, 0, ids, sizes)
    top, left, height, width = np.moveaxis(params.crop, -1, 0)
    assert (np.minimum(top, left) >= 0).all()
    assert (np.minimum(height, width) >= 1).all()
    assert (top + height <= sizes[:, :1]).all()
    assert (left + width <= sizes[:, 1:]).all()
    low, high = params.factors.min(axis=(0, 1)), params.factors.max(axis=(0, 1))
    for operation, centre, spread in ((BRIGHTNESS, 1, 0.4), (CONTRAST, 1, 0.4), (SATURATION, 1, 0.4), (HUE, 0, 0.1)):
        assert centre - spread - 1e-6 <= low[operation] <= high[operation] <= centre + spread + 1e-6
    assert (np.sort(params.order, axis=-1) == np.arange(4)).all()
    sigma = params.sigma[params.sigma > 0]
    assert ((sigma >= 0.1 - 1e-6) & (sigma <= 2.0 + 1e-6)).all()


def test_views_epochs_seeds_and_samples_differ() -> None:
    ids = np.arange(200)
    base = draw(ids)
    others = {
        "view": (base.factors[:, 1], base.crop[:, 1]),
        "epoch": (draw(ids, epoch=1).factors[:, 0], draw(ids, epoch=1).crop[:, 0]),
        "low half of the seed": (draw(ids, seed=1).factors[:, 0], draw(ids, seed=1).crop[:, 0]),
        "high half of the seed": (draw(ids, seed=2**32).factors[:, 0], draw(ids, seed=2**32).crop[:, 0]),
        "sample": (draw(ids + 1000).factors[:, 0], draw(ids + 1000).crop[:, 0]),
        "high half of the id": (draw(ids + 2**32).factors[:, 0], draw(ids + 2**32).crop[:, 0]),
    }
    for what, (factors, crop) in others.items():
        assert (factors != base.factors[:, 0]).all(axis=-1).mean() > 0.99, what
        assert (crop != base.crop[:, 0]).any(axis=-1).mean() > 0.99, what


def test_all_draws_of_a_sample_are_unrelated() -> None:
    """No two of a sample's numbers share their random bits: not between views, and not within one."""
    params = draw(np.arange(DRAWS))
    columns = [params.factors.reshape(DRAWS, -1), params.crop.reshape(DRAWS, 2, 4)[..., :2].reshape(DRAWS, -1)]
    columns += [getattr(params, name) for name in ("jitter", "gray", "solarize", "flip", "sigma")]
    correlations = np.abs(np.corrcoef(np.column_stack(columns).astype(float).T) - np.eye(22))
    for view in range(2):  # a large top leaves little room, so top and left of one view hang together
        top, left = 8 + 2 * view, 9 + 2 * view
        correlations[top, left] = correlations[left, top] = 0
    assert correlations.max() < Z_LIMIT / math.sqrt(DRAWS)


# The crop's distribution is that of torchvision.transforms.RandomResizedCrop.


def torchvision_crops(size: tuple[int, int], count: int) -> np.ndarray:
    image = torch.empty(3, *size)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return np.array(
            [
                RandomResizedCrop.get_params(image, list(RECIPE.crop_scale), list(RECIPE.crop_ratio))
                for _ in range(count)
            ]
        )


def crop_features(crops: np.ndarray) -> list[np.ndarray]:
    """Top, left, height, width, area, aspect, and where the centre lies along the diagonal."""
    top, left, height, width = crops.T
    return [top, left, height, width, height * width, width / height, top + left + (height + width) / 2]


@pytest.mark.parametrize(
    "size", [(375, 500), (500, 333), (32, 32), (33, 97), (2, 3), (3, 4), (1, 1), (10, 14), (20, 60), (60, 20)], ids=str
)
def test_crops_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    theirs = torchvision_crops(size, DRAWS)
    for view in range(2):
        ours = draw(np.arange(DRAWS), size).crop[:, view]
        for feature, (mine, other) in enumerate(zip(crop_features(ours), crop_features(theirs), strict=True)):
            assert kolmogorov_smirnov(mine, other) < 1, feature


@pytest.mark.parametrize("size", [(2, 3), (3, 2), (3, 4), (4, 4)], ids=str)
def test_crops_of_tiny_images_are_as_likely_as_torchvisions(size: tuple[int, int]) -> None:
    """Few windows are possible: their probabilities are compared one by one."""
    ours, theirs = draw(np.arange(2 * DRAWS), size).crop[:, 0], torchvision_crops(size, 2 * DRAWS)
    both, which = np.unique(np.concatenate((ours, theirs)), axis=0, return_inverse=True)
    counts = np.stack([np.bincount(part, minlength=len(both)) for part in np.split(which.ravel(), 2)])
    common = counts.sum(axis=0) >= 10
    counts = counts[:, common]
    chi_square = ((counts[0] - counts[1]) ** 2 / counts.sum(axis=0)).sum()
    freedom = max(1, common.sum() - 1)
    assert (chi_square - freedom) / math.sqrt(2 * freedom) < Z_LIMIT


LONG = [(10, 500), (500, 10), (1, 100), (100, 1), (7, 4000), (4000, 7)]


@pytest.mark.parametrize("size", LONG, ids=str)
def test_a_long_image_falls_back_as_in_torchvision(size: tuple[int, int]) -> None:
    """No attempt can fit: every crop is the largest centre crop of an allowed aspect."""
    expected = np.unique(torchvision_crops(size, 20), axis=0)
    assert len(expected) == 1
    np.testing.assert_array_equal(np.unique(draw(np.arange(500), size).crop.reshape(-1, 4), axis=0), expected)


@given(height=st.integers(1, 3000), width=st.integers(1, 3000))
def test_the_fallback_of_any_size_is_torchvisions(height: int, width: int) -> None:
    """A crop of three times the image, which no user can ask for, never fits: both must fall back."""
    recipe = ViewRecipe()
    object.__setattr__(recipe, "crop_scale", (3.0, 3.0))
    crop = draw_views(recipe, 0, 0, np.array([1]), np.array([[height, width]], dtype=np.int32)).crop
    image = torch.empty(1).expand(3, height, width)
    assert crop[0].tolist() == [list(RandomResizedCrop.get_params(image, [3.0, 3.0], list(recipe.crop_ratio)))] * 2


# Probabilities and ranges.


def assert_probability(happened: np.ndarray, probability: float) -> None:
    error = math.sqrt(probability * (1 - probability) / happened.size)
    assert abs(happened.mean() - probability) <= Z_LIMIT * error


def test_probabilities_are_the_recipes() -> None:
    params = draw(np.arange(20_000))
    for view in range(2):
        for name, probability in (("jitter", 0.8), ("gray", 0.2), ("solarize", 0.3), ("flip", 0.5)):
            assert_probability(getattr(params, name)[:, view], probability)
        assert_probability(params.sigma[:, view] > 0, 0.5)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_never_and_always(probability: float) -> None:
    names = ("flip_prob", "jitter_prob", "gray_prob", "blur_prob", "solarize_prob")
    recipe = ViewRecipe(**dict.fromkeys(names, probability))
    params = draw_views(recipe, 0, 0, np.arange(5000), np.full((5000, 2), 50, dtype=np.int32))
    for happened in (params.flip, params.jitter, params.gray, params.sigma > 0, params.solarize):
        assert (happened == bool(probability)).all()


def test_orders_of_the_jitter_are_equally_likely() -> None:
    assert len({tuple(order) for order in JITTER_ORDERS.tolist()}) == 24
    orders = draw(np.arange(12_000)).order.reshape(-1, 4).astype(int)
    counts = np.unique(orders @ [64, 16, 4, 1], return_counts=True)[1]
    assert len(counts) == 24
    assert abs(chi_square_z(counts, len(orders) / 24)) < Z_LIMIT


def test_factors_and_sigma_are_uniform_over_their_ranges() -> None:
    params = draw(np.arange(10_000))
    sigma = params.sigma[params.sigma > 0]
    ranges = [(0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1)]
    drawn = [(params.factors[..., operation].ravel(), *ranges[operation]) for operation in range(4)] + [
        (sigma, 0.1, 2.0)
    ]
    for values, low, high in drawn:
        counts = np.bincount(((values - low) / (high - low) * 50).astype(int).clip(0, 49), minlength=50)
        assert abs(chi_square_z(counts, values.size / 50)) < Z_LIMIT


def test_a_recipe_without_effect_changes_nothing() -> None:
    recipe = ViewRecipe(
        crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0
    )
    params = draw_views(recipe, 0, 0, np.arange(100), np.full((100, 2), 64, dtype=np.int32))
    assert (params.crop == [0, 0, 64, 64]).all()
    assert (params.factors == [1, 1, 1, 0]).all()


@pytest.mark.parametrize(
    ("flag", "fields"),
    [
        ("--image-size", {"image_size": 1}),
        ("--flip-prob", {"flip_prob": 1.1}),
        ("--jitter-prob", {"jitter_prob": -0.1}),
        ("--gray-prob", {"gray_prob": float("nan")}),
        ("--blur-prob", {"blur_prob": 2.0}),
        ("--solarize-prob", {"solarize_prob": -1.0}),
        ("--crop-scale", {"crop_scale": (0.0, 1.0)}),
        ("--crop-scale", {"crop_scale": (0.5, 0.2)}),
        ("--crop-scale", {"crop_scale": (0.5, 1.2)}),
        ("--crop-ratio", {"crop_ratio": (1.3, 0.7)}),
        ("--blur-sigma", {"blur_sigma": (0.0, 2.0)}),
        ("--brightness", {"brightness": 1.5}),
        ("--contrast", {"contrast": -0.1}),
        ("--saturation", {"saturation": float("nan")}),
        ("--hue", {"hue": 0.6}),
        ("--blur-radius", {"blur_radius": 0}),
        ("--std", {"std": (0.2, 0.0, 0.2)}),
        ("--std", {"std": (0.2, math.nan, 0.2)}),
        ("--mean", {"mean": (0.5, 0.5, math.nan)}),
        ("--crop-ratio", {"crop_ratio": (0.5, math.inf)}),
        ("--blur-sigma", {"blur_sigma": (0.1, math.inf)}),
        ("--solarize-threshold", {"solarize_threshold": 257}),
    ],
)
def test_an_impossible_recipe_is_refused_by_name(flag: str, fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"^{flag} "):
        ViewRecipe(**fields)


def test_the_blurs_window_fits_into_the_view() -> None:
    assert ViewRecipe().blur_window == 23
    assert ViewRecipe(image_size=5).blur_window == 9  # reflection needs a window of less than twice the side
    assert ViewRecipe(image_size=32, blur_radius=3).blur_window == 7


# The evaluation view.


@pytest.mark.parametrize(
    "size", [(375, 500), (500, 375), (257, 256), (256, 257), (333, 501), (231, 97), (100, 301), (61, 61)], ids=str
)
@pytest.mark.parametrize("image_size", [224, 97, 32])
def test_centre_crops_are_torchvisions_pixel_by_pixel(size: tuple[int, int], image_size: int) -> None:
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, *size), dtype=np.uint8))
    crops = centre_crops(image_size, np.array([size], dtype=np.int32))
    resized = image_size * 256 // 224 if image_size > 64 else image_size
    expected = Compose([Resize(resized, antialias=True), CenterCrop(image_size)])(image)
    assert torch.equal(reference.centre_crop(image, crops, 0, image_size), expected)


@given(height=SIDE, width=SIDE, image_size=st.integers(2, 512))
def test_centre_squares_lie_inside_the_image(height: int, width: int, image_size: int) -> None:
    crops = centre_crops(image_size, np.array([[height, width]], dtype=np.int32))
    assert (crops.corner >= 0).all()
    assert (crops.corner + image_size <= crops.resized).all()
    assert (crops.start >= 0).all()
    assert (crops.end <= np.array([height, width]) * (1 + 1e-6)).all()
    shorter, (tall, wide) = crops.resized.min(), crops.resized[0].tolist()
    assert shorter == (image_size if image_size <= 64 else image_size * 256 // 224)
    assert abs(tall / wide - height / width) <= max(height / width, 1) / shorter  # the aspect stays, to a pixel


# Groups of views.

MULTI_CROP = ViewRecipe(more_views=(ViewGroup(count=6, image_size=96, crop_scale=(0.05, 0.14), blur_prob=0.1),))


def test_the_first_views_do_not_change_with_the_number_of_views() -> None:
    ids, sizes = np.arange(300), np.tile(np.array([[300, 400]], dtype=np.int32), (300, 1))
    extra = Augmentations(erasing=Erasing(prob=0.5))
    two = draw_views(dataclasses.replace(RECIPE, extra=extra), 3, 1, ids, sizes)
    group = ViewGroup(count=6, image_size=96, crop_scale=(0.05, 0.14), jitter_prob=0.1, solarize_prob=0.9)
    eight = draw_views(dataclasses.replace(RECIPE, extra=extra, more_views=(group,)), 3, 1, ids, sizes)
    assert (two.views, eight.views) == (2, 8)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(eight, name)[:, :2], getattr(two, name), err_msg=name)
    alike = draw_views(dataclasses.replace(RECIPE, extra=extra, count=8), 3, 1, ids, sizes)
    np.testing.assert_array_equal(alike.order, eight.order)  # a view's numbers depend on its number alone
    np.testing.assert_array_equal(alike.extra, eight.extra)


def test_the_draws_are_pinned() -> None:
    """Of the recorded first version: two views, then all eight; a change breaks --resume of every run."""
    ids, sizes = np.array([0, 7, 2**40 + 3]), np.array([[300, 400], [375, 500], [33, 97]], dtype=np.int32)
    two, eight = draw_views(ViewRecipe(), 5, 2, ids, sizes), draw_views(MULTI_CROP, 5, 2, ids, sizes)
    assert two.crop.tolist() == PINNED_CROPS
    assert eight.crop[:, :2].tolist() == PINNED_CROPS
    assert eight.crop[0, 2:].tolist() == PINNED_SMALL_CROPS


PINNED_CROPS = [
    [[86, 58, 181, 139], [36, 64, 228, 224]],
    [[24, 74, 339, 349], [3, 7, 299, 358]],
    [[1, 39, 32, 35], [3, 39, 25, 31]],
]
PINNED_SMALL_CROPS = [
    [207, 229, 91, 94],
    [2, 183, 77, 89],
    [208, 199, 82, 109],
    [33, 110, 147, 111],
    [99, 270, 82, 104],
    [181, 75, 77, 87],
]


def test_each_group_follows_its_own_fields() -> None:
    recipe = ViewRecipe(
        count=1,
        blur_prob=1.0,
        more_views=(
            ViewGroup(blur_prob=0.1, solarize_prob=0.2),
            ViewGroup(count=6, image_size=96, crop_scale=(0.05, 0.14), hue=0.0, blur_sigma=(0.5, 0.6), flip_prob=0.0),
        ),
    )
    params = draw_views(recipe, 0, 0, np.arange(4000), np.full((4000, 2), 400, dtype=np.int32))
    assert params.views == 8
    assert [own.image_size for own in recipe.per_view] == [224, 224] + [96] * 6
    for view, (blur, solarize, flip) in enumerate([(1.0, 0.0, 0.5), (0.1, 0.2, 0.5)] + [(1.0, 0.0, 0.0)] * 6):
        for happened, probability in ((params.sigma > 0, blur), (params.solarize, solarize), (params.flip, flip)):
            assert_probability(happened[:, view], probability)
    area = params.crop[..., 2] * params.crop[..., 3] / 400**2
    assert area[:, :2].min() >= 0.19
    assert area[:, :2].max() > 0.9
    assert area[:, 2:].min() >= 0.045
    assert area[:, 2:].max() <= 0.145
    assert (params.factors[:, 2:, HUE] == 0).all()
    assert params.sigma[:, 2:].min() >= 0.5
    assert params.sigma[:, 2:].max() <= 0.6


def test_views_of_all_groups_are_unrelated() -> None:
    params = draw_views(MULTI_CROP, 0, 0, np.arange(DRAWS), np.full((DRAWS, 2), 400, dtype=np.int32))
    columns = [params.factors.reshape(DRAWS, -1), params.crop[..., 0], params.flip, params.gray]
    table = np.column_stack(columns).astype(float)
    correlations = np.abs(np.corrcoef(table.T) - np.eye(table.shape[1]))
    assert correlations.max() < Z_LIMIT / math.sqrt(DRAWS)


GROUP_WORDS = "count=6 image-size=96 crop-scale=0.05,0.14 interpolation=bicubic blur-radius=4"


def test_a_group_is_written_as_words() -> None:
    group = parse_group(GROUP_WORDS)
    expected = ViewGroup(count=6, image_size=96, crop_scale=(0.05, 0.14), interpolation="bicubic", blur_radius=4)
    assert group == expected
    assert parse_group(str(group)) == group
    assert parse_group("") == ViewGroup()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("colour=3", r"colour=3 is not NAME=VALUE with a NAME among count, image-size"),
        ("6x96", "6x96 is not NAME=VALUE"),
        ("count", "count takes a number, such as 2"),
        ("count=two", "count=two: count takes a number"),
        ("blur-prob=", "blur-prob takes a number, such as 0.5"),
        ("crop-scale=0.1", "crop-scale takes two numbers, such as 0.05,0.14"),
        ("crop-scale=0.1,0.2,0.3", "crop-scale takes two numbers"),
        ("count=1 count=2", "count is given twice"),
        ("mean=0.5", "mean=0.5 is not NAME=VALUE"),
        ("interpolation=nearest", "interpolation is one of bilinear, bicubic"),
    ],
)
def test_other_words_are_refused(words: str, said: str) -> None:
    with pytest.raises(UserError, match=f"^'{words}': .*{said}"):
        parse_group(words)


@pytest.mark.parametrize(
    ("group", "said"),
    [
        (ViewGroup(count=0), "--more-views 'count=0': count 0: a group has at least 1 view"),
        (ViewGroup(count=2, image_size=1), "'count=2 image-size=1': image-size 1: a view has at least 2 px a side"),
        (ViewGroup(crop_scale=(0.5, 0.1)), r"crop-scale \(0.5, 0.1\): it takes two numbers, 0 < low <= high"),
        (ViewGroup(crop_scale=(0.5, 1.5)), "a crop is no larger than its image"),
        (ViewGroup(blur_prob=1.5), "blur-prob 1.5: a probability lies in 0 .. 1"),
        (ViewGroup(count=255), "views of each image: 257: .* at most 256"),
    ],
)
def test_an_impossible_group_is_refused_by_name(group: ViewGroup, said: str) -> None:
    with pytest.raises(UserError, match=said):
        ViewRecipe(more_views=(group,))


def test_as_many_views_as_the_draws_can_tell_apart() -> None:
    with pytest.raises(UserError, match="--views 0"):
        ViewRecipe(count=0)
    with pytest.raises(UserError, match="at most 256"):
        ViewRecipe(count=257)
    params = draw_views(ViewRecipe(count=256), 0, 0, np.arange(2), np.full((2, 2), 64, dtype=np.int32))
    assert len(np.unique(params.factors.reshape(-1, 4), axis=0)) == 512


def test_the_identity_of_two_alike_views_is_that_of_older_checkpoints() -> None:
    identity = ViewRecipe().identity()
    assert not {"count", "interpolation", "more_views", "extra"} & set(identity)
    assert ViewRecipe(count=3).identity() == {**identity, "count": 3}
    assert ViewRecipe(interpolation="bicubic").identity() == {**identity, "interpolation": "bicubic"}
    group = ViewGroup(count=6, image_size=96)
    assert ViewRecipe(more_views=(group,)).identity() == {**identity, "more_views": [{"count": 6, "image_size": 96}]}
