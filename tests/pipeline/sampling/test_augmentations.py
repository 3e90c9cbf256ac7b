"""Augmentations beyond the paper's recipe: each against torchvision, all alike on every back end, off by default."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomErasing
from torchvision.transforms.v2 import functional as F

from pipeline.common.errors import UserError
from pipeline.dataset.dataset import ShardSet
from pipeline.loader.config import LoaderConfig
from pipeline.loader.loader import ViewBatch, open_images, open_views
from pipeline.sampling.augmentations import (
    DRAWS,
    Augmentation,
    Augmentations,
    Erasing,
    Posterize,
    QuarterTurns,
    VerticalFlip,
    augment,
    augment_bytes,
)
from pipeline.sampling.sampler import BatchSampler, World
from pipeline.sampling.views import ViewRecipe, draw_views
from tests.helpers.chance import Z_LIMIT, chi_square_z, kolmogorov_smirnov
from train.config.recipes import parse_config

CPU = torch.device("cpu")
NAMES = [option.name for option in dataclasses.fields(Augmentations)]
ALL_ON = Augmentations(VerticalFlip(0.5), QuarterTurns(0.75), Erasing(0.4))
DALI = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
BACKENDS = [
    "torchvision",
    pytest.param(
        "dali", marks=pytest.mark.skipif(not DALI, reason="needs NVIDIA DALI: pip install nvidia-dali-cuda130")
    ),
]


def uniforms(count: int, seed: int = 0) -> np.ndarray:
    """Numbers for ``count`` views, of all augmentations."""
    return np.random.default_rng(seed).uniform(1e-9, 1 - 1e-9, (count, len(NAMES), DRAWS))


def images(count: int, side: int = 9) -> torch.Tensor:
    """Random views in the memory layout of the loader's."""
    made = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))
    return made.contiguous(memory_format=torch.channels_last)


def apply(views: torch.Tensor, draws: np.ndarray, augmentations: Augmentations) -> torch.Tensor:
    """In a copy: of bytes or of finished views, as the dtype says."""
    of = augment_bytes if views.dtype == torch.uint8 else augment
    return of(views.clone(memory_format=torch.preserve_format), draws, augmentations)


def examples(name: str, count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What an augmentation of this name takes: finished views of ``dtype``, or bytes."""
    if not getattr(Augmentations(), name).on_bytes:
        return images(count).to(dtype)
    made = torch.randint(0, 256, (count, 3, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return made.contiguous(memory_format=torch.channels_last)


def only(name: str, **options: Any) -> Augmentations:
    """One augmentation, always applied."""
    kind = type(getattr(Augmentations(), name))
    return Augmentations(**{name: kind(**{"prob": 1.0, **options})})


def test_vertical_flip_is_torchvisions() -> None:
    views = images(5)
    assert torch.equal(augment(views.clone(), uniforms(5), only("vertical_flip")), F.vertical_flip(views))


def test_quarter_turns_are_torchvisions_and_equally_likely() -> None:
    views = images(3000)
    turned = augment(views.clone(), uniforms(3000), only("quarter_turns"))
    counts = [0, 0, 0]
    for before, after in zip(views, turned, strict=True):
        (turns,) = [k for k in (1, 2, 3) if torch.equal(after, F.rotate(before, 90.0 * k))]
        counts[turns - 1] += 1
    assert chi_square_z(counts, 1000) < Z_LIMIT


def test_erased_rectangles_are_distributed_as_torchvisions() -> None:
    """Where every rectangle fits, so that torchvision never has to draw again."""
    side, count, area, ratio = 40, 2000, (0.02, 0.2), (0.5, 2.0)
    erased = augment(torch.ones(count, 3, side, side), uniforms(count), only("erasing", area=area, ratio=ratio))
    ours = [rectangle(view) for view in erased]
    torch.manual_seed(0)
    blank = torch.ones(3, side, side)
    theirs = [RandomErasing.get_params(blank, area, ratio, [0.0])[:4] for _ in range(count)]
    for edge in range(4):
        assert kolmogorov_smirnov([o[edge] for o in ours], [t[edge] for t in theirs]) < 1


def rectangle(view: torch.Tensor) -> tuple[int, int, int, int]:
    """Top, left, height and width of what is 0, which must be one whole rectangle in all channels."""
    gone = view == 0
    assert torch.equal(gone, gone[:1].expand_as(gone))
    rows, columns = (gone[0].any(dim=other).nonzero().flatten().tolist() for other in (1, 0))
    assert int(gone[0].sum()) == len(rows) * len(columns)
    assert rows == list(range(rows[0], rows[-1] + 1))
    assert columns == list(range(columns[0], columns[-1] + 1))
    assert torch.equal(view[~gone], torch.ones_like(view[~gone]))
    return rows[0], columns[0], len(rows), len(columns)


@pytest.mark.parametrize("ratio", [(100.0, 100.0), (0.01, 0.01)])
def test_a_rectangle_longer_than_the_view_is_cut_to_it(ratio: tuple[float, float]) -> None:
    erased = augment(torch.ones(20, 3, 16, 16), uniforms(20), only("erasing", area=(0.5, 0.5), ratio=ratio))
    for view in erased:
        _, _, height, width = rectangle(view)
        assert max(height, width) == 16
        assert min(height, width) == 1


@pytest.mark.parametrize("name", NAMES)
def test_each_is_applied_as_often_as_asked(name: str) -> None:
    """To views of their own, whatever else is on."""
    views, draws = examples(name, 4000), uniforms(4000)
    changed = (apply(views, draws, only(name, prob=0.3)) != views).flatten(1).any(dim=1).numpy()
    assert chi_square_z([changed.sum(), (~changed).sum()], [0.3 * 4000, 0.7 * 4000]) < Z_LIMIT
    np.testing.assert_array_equal(changed, draws[:, NAMES.index(name), 0] < 0.3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_each_keeps_form_type_and_layout(name: str, dtype: torch.dtype) -> None:
    views = examples(name, 6, dtype)
    made = apply(views, uniforms(6), only(name))
    assert (made.shape, made.dtype) == (views.shape, views.dtype)
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(made, views)


@pytest.mark.parametrize("name", NAMES)
def test_no_view_depends_on_its_neighbours(name: str) -> None:
    views, draws = examples(name, 7), uniforms(7)
    on_all_ranks = apply(views, draws, only(name, prob=0.6))
    alone = [apply(views[i : i + 1], draws[i : i + 1], only(name, prob=0.6)) for i in range(7)]
    assert torch.equal(on_all_ranks, torch.cat(alone))


def test_a_new_one_needs_nothing_but_its_class() -> None:
    """What the module's first lines promise: here a class of which the rest of the program has never heard."""

    @dataclass(frozen=True)
    class Negative(Augmentation):
        def apply(self, views: torch.Tensor, uniforms: np.ndarray) -> torch.Tensor:
            return -views

    @dataclass(frozen=True)
    class More(Augmentations):
        negative: Negative = Negative()

    more = More(negative=Negative(1.0))
    sizes = np.full((5, 2), 30, np.int32)
    plain = draw_views(ViewRecipe(image_size=8), 3, 1, np.arange(5), sizes)
    params = draw_views(ViewRecipe(image_size=8, extra=more), 3, 1, np.arange(5), sizes)
    assert params.extra.shape == (5, 2, len(NAMES) + 1, DRAWS)
    np.testing.assert_array_equal(params.crop, plain.crop)
    views = images(5)
    assert torch.equal(augment(views.clone(), params.extra[:, 0], more), -views)


def test_draws_are_those_of_the_sample_and_of_no_other_augmentation() -> None:
    """A sample has its own, in each view and epoch; another augmentation that is switched on moves none of them."""
    recipe = ViewRecipe(extra=only("erasing"))
    sizes = np.full((6, 2), 30, np.int32)
    first = draw_views(recipe, 0, 0, np.arange(6), sizes).extra
    assert len(np.unique(first)) == first.size
    assert not np.isin(draw_views(recipe, 0, 1, np.arange(6), sizes).extra, first).any()
    assert not np.isin(draw_views(recipe, 1, 0, np.arange(6), sizes).extra, first).any()
    np.testing.assert_array_equal(draw_views(recipe, 0, 0, np.array([4]), sizes[:1]).extra[0], first[4])
    np.testing.assert_array_equal(draw_views(replace(recipe, extra=ALL_ON), 0, 0, np.arange(6), sizes).extra, first)


def load(dataset: ShardSet, backend: Any, extra: Augmentations) -> list[ViewBatch]:
    """Three steps of twelve samples."""
    recipe, config = ViewRecipe(image_size=24, extra=extra), LoaderConfig(backend=backend, threads=2)
    with open_views(dataset, recipe, config, BatchSampler(5, 12, epochs=1), World.alone(CPU)) as batches:
        return list(itertools.islice(batches, 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_they_follow_the_papers_recipe_on_every_back_end(photo_dataset: ShardSet, backend: str) -> None:
    """Bit for bit: the views without them, then each augmentation by the numbers drawn for the sample."""
    recipe = ViewRecipe(image_size=24, extra=ALL_ON)
    plain, made = load(photo_dataset, backend, Augmentations()), load(photo_dataset, backend, ALL_ON)
    for before, after in zip(plain, made, strict=True):
        extra = draw_views(recipe, 5, 0, after.ids, photo_dataset.sizes(after.ids)).extra
        for view, (x, changed) in enumerate(zip(before.views, after.views, strict=True)):
            assert torch.equal(augment(x.clone(), extra[:, view], ALL_ON), changed)
            assert not torch.equal(x, changed)
            assert changed.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_posterize_is_torchvisions(bits: int) -> None:
    squares = examples("posterize", 5)
    made = apply(squares, uniforms(5), only("posterize", bits=bits))
    assert torch.equal(made, F.posterize(squares, bits))
    assert made.is_contiguous(memory_format=torch.channels_last)


NO_COLOURS: dict[str, Any] = {"jitter_prob": 0.0, "gray_prob": 0.0, "blur_prob": 0.0}


@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_are_changed_before_they_are_normalised_on_every_back_end(photo_dataset: ShardSet, backend: Any) -> None:
    """Bit for bit: the plain view's bytes, posterized where the sample's draw says so."""
    extra, config = Augmentations(posterize=Posterize(0.5, bits=2)), LoaderConfig(backend=backend, threads=2)
    made = {}
    for kind in (Augmentations(), extra):
        recipe = ViewRecipe(image_size=24, extra=kind, mean=(0.0,) * 3, std=(1.0,) * 3, **NO_COLOURS)
        with open_views(photo_dataset, recipe, config, BatchSampler(5, 12, epochs=1), World.alone(CPU)) as batches:
            made[kind] = next(batches)
    before, after = made[Augmentations()], made[extra]
    draws = draw_views(recipe, 5, 0, after.ids, photo_dataset.sizes(after.ids)).extra
    for view in range(2):
        plain = (before.views[view] * 255).round().to(torch.uint8)
        wanted = apply(plain, draws[:, view], extra)
        assert torch.equal((after.views[view] * 255).round().to(torch.uint8), wanted)
        assert not torch.equal(plain, wanted)


def test_back_ends_agree_on_the_whole_recipe_with_changed_bytes(photo_dataset: ShardSet) -> None:
    """The colours follow, so that views differ by their rounding alone."""
    if not DALI:
        pytest.skip("needs NVIDIA DALI: pip install nvidia-dali-cuda130")
    extra = Augmentations(posterize=Posterize(1.0, bits=3))
    ours, theirs = load(photo_dataset, "dali", extra), load(photo_dataset, "torchvision", extra)
    for one, other in zip(ours, theirs, strict=True):
        for x, y in zip(one.views, other.views, strict=True):
            assert float((x - y).abs().max()) * 255 * 0.229 <= 6
            assert float((x - y).abs().mean()) * 255 * 0.229 < 0.05


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_for_evaluation_are_left_alone(photo_dataset: ShardSet, backend: Any) -> None:
    made = []
    for extra in (Augmentations(), ALL_ON):
        recipe, config = ViewRecipe(image_size=24, extra=extra), LoaderConfig(backend=backend, threads=2)
        with open_images(photo_dataset, recipe, config, World.alone(CPU), ids=np.arange(8), batch=8) as batches:
            made.append(next(batches)[0])
    assert torch.equal(*made)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (VerticalFlip, {"prob": 1.5}, "--vertical-flip.prob 1.5: a probability"),
        (QuarterTurns, {"prob": -0.1}, "--quarter-turns.prob -0.1: a probability"),
        (Erasing, {"area": (0.5, 0.1)}, "--erasing.area (0.5, 0.1): it takes two numbers"),
        (Erasing, {"area": (0.5, 1.1)}, "--erasing.area (0.5, 1.1): it takes two numbers"),
        (Erasing, {"ratio": (0.0, 1.0)}, "--erasing.ratio (0.0, 1.0): it takes two numbers"),
        (Erasing, {"ratio": (0.3, math.inf)}, "--erasing.ratio (0.3, inf): it takes two numbers"),
        (Posterize, {"bits": 0}, "--posterize.bits 0: a byte has 1 .. 8 bits to keep"),
        (Posterize, {"bits": 9}, "--posterize.bits 9: a byte has 1 .. 8 bits to keep"),
        (Posterize, {"prob": -1.0}, "--posterize.prob -1.0: a probability"),
        (Erasing, {"prob": 2.0}, "--erasing.prob 2.0: a probability"),
    ],
)
def test_options_that_cannot_be(kind: type[Augmentation], options: dict[str, Any], words: str) -> None:
    (name,) = [name for name in NAMES if type(getattr(Augmentations(), name)) is kind]
    with pytest.raises(UserError) as raised:
        Augmentations(**{name: kind(**options)})
    assert str(raised.value).startswith(words)


def test_a_run_is_resumed_only_with_the_same_ones(tmp_path: Path) -> None:
    """Those that are off are no part of its identity, so that checkpoints outlive new augmentations."""

    def identity(*flags: str) -> dict[str, Any]:
        return parse_config(["--data", str(tmp_path), "--run-dir", str(tmp_path), *flags]).identity("x")

    plain = identity()
    assert not [name for name in plain if "extra" in name or any(option in name for option in NAMES)]
    assert identity("--erasing.area", "0.1", "0.2") == plain
    on = identity("--erasing.prob", "0.5")
    assert on["views.erasing"] == {"prob": 0.5, "area": [0.02, 0.33], "ratio": [0.3, 3.3]}
    assert identity("--erasing.prob", "0.5", "--erasing.area", "0.1", "0.2") != on


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_gives_what_a_cpu_gives(name: str) -> None:
    views, draws = examples(name, 16), uniforms(16)
    on_gpu = apply(views.cuda(), draws, only(name, prob=0.5))
    assert torch.equal(on_gpu.cpu(), apply(views, draws, only(name, prob=0.5)))
