"""The whole loader: the same views from both back ends, on any ranks, with any settings, resumed, past bad samples."""

from __future__ import annotations

import gc
import importlib.util
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.backends import reference
from pipeline.backends.base import DaliConfig
from pipeline.common.errors import UserError
from pipeline.common.system import share_of_cores
from pipeline.dataset.dataset import BadSampleError, ShardSet
from pipeline.loader import loader as loader_module
from pipeline.loader.bad_samples import BadSamples
from pipeline.loader.config import LoaderConfig
from pipeline.loader.loader import ViewBatch, open_crops, open_images, open_views
from pipeline.loader.read_batches import Assembler
from pipeline.sampling.augmentations import Augmentations, Erasing, VerticalFlip
from pipeline.sampling.sampler import BatchSampler, World, batch_ids
from pipeline.sampling.views import ViewGroup, ViewRecipe, centre_crops, draw_views
from tests.helpers.damage import change_bytes, copy_dataset, put_image
from tests.helpers.encoded import only_pil_decodes
from tests.helpers.photos import image_bytes

DALI = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
BACKENDS = [
    "torchvision",
    pytest.param(
        "dali", marks=pytest.mark.skipif(not DALI, reason="needs NVIDIA DALI: pip install nvidia-dali-cuda130")
    ),
]
both_backends = pytest.mark.parametrize("backend", BACKENDS)
needs_dali = pytest.mark.skipif(not DALI, reason="needs NVIDIA DALI: pip install nvidia-dali-cuda130")

RECIPE = ViewRecipe(image_size=32, solarize_prob=0.2)
ALONE = World.alone(torch.device("cpu"))
STD = torch.tensor(RECIPE.std)[:, None, None]


def settings(backend: Any, **fields: Any) -> LoaderConfig:
    return LoaderConfig(**{"backend": backend, "threads": 2, **fields})


def part_of(rank: int, world_size: int) -> World:
    """One process among those of several machines with one each."""
    return World(rank, world_size, 0, 1, torch.device("cpu"))


def load(
    dataset: ShardSet,
    config: LoaderConfig,
    limit: int | None = None,
    sampler: dict[str, int] | None = None,
    process: World = ALONE,
    **options: Any,
) -> list[ViewBatch]:
    """All views (or the first few) of two epochs of four steps of twelve samples, or as ``sampler`` says."""
    batches_of = BatchSampler(**{"seed": 9, "global_batch": 12, "epochs": 2, **(sampler or {})})
    with open_views(dataset, RECIPE, config, batches_of, process, **options) as batches:
        return list(itertools.islice(batches, limit))


def assert_same(ours: list[ViewBatch], theirs: list[ViewBatch]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.epoch, one.step) == (other.epoch, other.step)
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.sources, other.sources)
        assert torch.equal(one.x1, other.x1)
        assert torch.equal(one.x2, other.x2)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """0.5 of 255 in the mean and 99 % of the values within 4."""
    apart = (ours - theirs).abs() * STD * 255
    assert apart.mean() <= 0.5
    assert (apart <= 4).float().mean() >= 0.99


@both_backends
def test_views_are_those_of_order_and_recipe(photo_dataset: ShardSet, backend: str) -> None:
    """Against a few lines that do everything one by one."""
    delivered = load(photo_dataset, settings(backend))
    assert [(views.epoch, views.step) for views in delivered] == [(e, s) for e in range(2) for s in range(4)]
    for views in delivered:
        np.testing.assert_array_equal(views.ids, batch_ids(48, 9, views.epoch, views.step, 12))
        np.testing.assert_array_equal(views.sources, views.ids)
        assert views.wait_s >= 0
        params = draw_views(RECIPE, 9, views.epoch, views.ids, photo_dataset.sizes(views.ids))
        images = [reference.decode(photo_dataset.read(int(sample))) for sample in views.ids]
        for view, x in enumerate(views.views):
            assert x.shape == (12, 3, 32, 32)
            assert x.dtype == torch.float32
            assert x.is_contiguous(memory_format=torch.channels_last)
            made = [reference.transform(pic, params, i, view, RECIPE) for i, pic in enumerate(images)]
            assert_close(x, torch.stack([reference.normalise(pic, RECIPE) for pic in made]))


@both_backends
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_one_global_batch(photo_dataset: ShardSet, backend: str, world_size: int) -> None:
    """The parts of all ranks, side by side, are what a single rank sees, bit for bit."""
    single = load(photo_dataset, settings(backend))
    ranks = [load(photo_dataset, settings(backend), process=part_of(rank, world_size)) for rank in range(world_size)]
    for whole, *parts in zip(single, *ranks, strict=True):
        assert [len(part.ids) for part in parts] == [12 // world_size] * world_size
        np.testing.assert_array_equal(np.concatenate([part.ids for part in parts]), whole.ids)
        assert torch.equal(torch.cat([part.x1 for part in parts]), whole.x1)
        assert torch.equal(torch.cat([part.x2 for part in parts]), whole.x2)


@both_backends
def test_micro_batches_make_up_the_batch(photo_dataset: ShardSet, backend: str) -> None:
    whole = load(photo_dataset, settings(backend), sampler={"epochs": 1})
    micro = load(photo_dataset, settings(backend), sampler={"epochs": 1, "accumulate": 3})
    assert [views.step for views in micro] == [step for step in range(4) for _ in range(3)]
    for step, views in enumerate(whole):
        parts = micro[3 * step : 3 * step + 3]
        np.testing.assert_array_equal(np.concatenate([part.ids for part in parts]), views.ids)
        assert torch.equal(torch.cat([part.x1 for part in parts]), views.x1)
        assert torch.equal(torch.cat([part.x2 for part in parts]), views.x2)


@both_backends
@pytest.mark.parametrize(("epoch", "step"), [(0, 0), (0, 2), (0, 4), (1, 0), (1, 3)])
def test_a_resume_delivers_the_later_batches_bit_for_bit(
    photo_dataset: ShardSet, backend: str, epoch: int, step: int
) -> None:
    whole = load(photo_dataset, settings(backend))
    rest = {"start_epoch": epoch, "start_step": step}
    assert_same(load(photo_dataset, settings(backend), sampler=rest), whole[4 * epoch + step :])


@both_backends
@pytest.mark.parametrize(
    "fields",
    [
        {"threads": 1},
        {"threads": 5},
        {"prefetch": 1},
        {"prefetch": 7},
        {"read_ahead": 1},
        {"read_ahead": 20},
        {"dali": DaliConfig(prefetch=1)},
        {"dali": DaliConfig(prefetch=5)},
    ],
    ids=str,
)
def test_settings_change_nothing_but_speed(photo_dataset: ShardSet, backend: str, fields: dict[str, Any]) -> None:
    assert_same(load(photo_dataset, settings(backend, **fields)), load(photo_dataset, settings(backend)))


@both_backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types(photo_dataset: ShardSet, backend: str, dtype: torch.dtype) -> None:
    wide = load(photo_dataset, settings(backend), limit=1)[0]
    narrow = load(photo_dataset, settings(backend), limit=1, dtype=dtype)[0]
    assert narrow.x1.dtype == narrow.x2.dtype == dtype
    assert narrow.x1.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(narrow.x1, wide.x1.to(dtype))


@both_backends
def test_views_stay_as_they_were_while_later_ones_come(photo_dataset: ShardSet, backend: str) -> None:
    """A training step may keep its batch: memory that is lent again must not be among it."""
    with open_views(photo_dataset, RECIPE, settings(backend), BatchSampler(9, 4, epochs=1), ALONE) as batches:
        held = [next(batches) for _ in range(2)]
        copies = [(views.x1.clone(), views.x2.clone()) for views in held]
        for _ in batches:
            pass
    for views, (x1, x2) in zip(held, copies, strict=True):
        assert torch.equal(views.x1, x1)
        assert torch.equal(views.x2, x2)


@both_backends
def test_leaving_early_leaves_no_thread_behind(photo_dataset: ShardSet, backend: str) -> None:
    load(photo_dataset, settings(backend), limit=1)  # what libraries start for themselves is there now
    before = set(threading.enumerate())
    for limit in (0, 1, 3):
        load(photo_dataset, settings(backend, threads=3), limit=limit)
        assert set(threading.enumerate()) == before


def test_fewer_samples_than_a_batch_are_no_batch(photo_dataset: ShardSet) -> None:
    assert load(photo_dataset, settings("torchvision"), sampler={"global_batch": 49}) == []


def test_a_machines_ranks_share_its_cores() -> None:
    assert share_of_cores(1) >= 1
    assert share_of_cores(10**6) == 1


def images(dataset: ShardSet, backend: str, ids: list[int], batch: int = 10, **options: Any) -> list[Any]:
    with open_images(
        dataset,
        RECIPE,
        settings(backend),
        ALONE,
        ids=np.array(ids, dtype=np.int64),
        batch=batch,
        **options,
    ) as batches:
        return list(batches)


@both_backends
@pytest.mark.parametrize("ids", [list(range(48)), [5, 5, 47, 0], [3]], ids=["all", "some twice", "one"])
def test_evaluation_images_come_in_the_order_asked_for(photo_dataset: ShardSet, backend: str, ids: list[int]) -> None:
    made = images(photo_dataset, backend, ids)
    assert [len(part) for _, part in made] == [min(10, len(ids) - start) for start in range(0, len(ids), 10)]
    assert np.concatenate([part for _, part in made]).tolist() == ids
    crops = centre_crops(32, photo_dataset.sizes(ids))
    expected = [
        reference.centre_crop(reference.decode(photo_dataset.read(sample)), crops, i, 32)
        for i, sample in enumerate(ids)
    ]
    assert_close(torch.cat([x for x, _ in made]), torch.stack([reference.normalise(pic, RECIPE) for pic in expected]))


@both_backends
def test_no_images_to_evaluate(photo_dataset: ShardSet, backend: str) -> None:
    assert images(photo_dataset, backend, []) == []


@both_backends
def test_training_and_evaluation_may_run_at_once(photo_dataset: ShardSet, backend: str) -> None:
    alone = load(photo_dataset, settings(backend))
    evaluated = images(photo_dataset, backend, list(range(48)))
    on_all_ranks = []
    with open_views(photo_dataset, RECIPE, settings(backend), BatchSampler(9, 12, epochs=2), ALONE) as batches:
        on_all_ranks.append(next(batches))
        again = images(photo_dataset, backend, list(range(48)))
        on_all_ranks.extend(batches)
    assert_same(on_all_ranks, alone)
    for (x, _), (y, _) in zip(again, evaluated, strict=True):
        assert torch.equal(x, y)


# Bad samples.


class Reports(list[BadSampleError]):
    """Collects reports of bad samples."""

    @property
    def ids(self) -> list[int]:
        return sorted(report.sample_id for report in self)


def assert_replaced(whole: list[ViewBatch], clean: list[ViewBatch], replaced: dict[int, int]) -> None:
    """Where a sample is bad its substitute is seen, with views of the substitute's own; all others are as ever."""
    for views, before in zip(whole, clean, strict=True):
        np.testing.assert_array_equal(views.ids, before.ids)
        assert views.sources.tolist() == [replaced.get(sample, sample) for sample in views.ids.tolist()]
        same = torch.from_numpy(views.sources == views.ids)
        assert torch.equal(views.x1[same], before.x1[same])
        assert torch.equal(views.x2[same], before.x2[same])
    seen = {(views.epoch, int(source)): i for views in clean for i, source in enumerate(views.sources)}
    at = {(views.epoch, int(source)): views for views in clean for source in views.sources}
    for views in whole:
        for i in np.flatnonzero(views.sources != views.ids):
            substitute = (views.epoch, int(views.sources[i]))
            assert torch.equal(views.x1[i], at[substitute].x1[seen[substitute]])
            assert torch.equal(views.x2[i], at[substitute].x2[seen[substitute]])


BAD = {5: 6, 10: 12, 11: 12, 47: 0}  # and by whom they are replaced: two in a row, and the last


@pytest.fixture
def changed(photo_dataset_path: Path, tmp_path: Path) -> ShardSet:
    """A dataset some of whose images changed on the disk."""
    path = copy_dataset(photo_dataset_path, tmp_path / "changed")
    change_bytes(path, list(BAD))
    return ShardSet.open(path)


@pytest.fixture
def undecodable(photo_dataset_path: Path, tmp_path: Path) -> ShardSet:
    """A dataset some of whose images cannot be decoded, though they are what was written."""
    path = copy_dataset(photo_dataset_path, tmp_path / "undecodable")
    for sample in BAD:
        put_image(path, sample, ShardSet.open(path).read(sample)[:-400])
    return ShardSet.open(path)


@both_backends
@pytest.mark.parametrize("kind", ["changed", "undecodable"])
def test_bad_samples_are_replaced_and_reported_once(
    kind: str, photo_dataset: ShardSet, backend: str, request: pytest.FixtureRequest
) -> None:
    dataset, reports = request.getfixturevalue(kind), Reports()
    whole = load(dataset, settings(backend), on_bad_sample=reports.append)
    assert_replaced(whole, load(photo_dataset, settings(backend)), BAD)
    assert reports.ids == sorted(BAD)
    for report in reports:
        assert report.shard == photo_dataset.shards[report.sample_id // 10].name
        assert report.key == photo_dataset.key(report.sample_id)
        assert ("checksum differs" if kind == "changed" else "cannot be decoded") in report.reason
        assert "\n" not in str(report)


@both_backends
@pytest.mark.parametrize("kind", ["changed", "undecodable"])
def test_bad_samples_are_replaced_alike_after_a_resume_and_on_any_ranks(
    kind: str, backend: str, request: pytest.FixtureRequest
) -> None:
    dataset, silent = request.getfixturevalue(kind), Reports()
    whole = load(dataset, settings(backend), on_bad_sample=silent.append)
    for epoch, step in ((0, 2), (1, 1)):
        rest = {"start_epoch": epoch, "start_step": step}
        resumed = load(dataset, settings(backend), sampler=rest, on_bad_sample=silent.append)
        assert_same(resumed, whole[4 * epoch + step :])
    ranks = [
        load(dataset, settings(backend), process=part_of(rank, 3), on_bad_sample=silent.append) for rank in range(3)
    ]
    for views, *parts in zip(whole, *ranks, strict=True):
        np.testing.assert_array_equal(np.concatenate([part.sources for part in parts]), views.sources)
        assert torch.equal(torch.cat([part.x1 for part in parts]), views.x1)


@needs_dali
@pytest.mark.parametrize("kind", ["changed", "undecodable"])
def test_both_backends_find_the_same_bad_samples(kind: str, request: pytest.FixtureRequest) -> None:
    dataset, found = request.getfixturevalue(kind), {"dali": Reports(), "torchvision": Reports()}
    delivered = {
        backend: load(dataset, settings(backend), on_bad_sample=reports.append) for backend, reports in found.items()
    }
    assert sorted(map(str, found["dali"])) == sorted(map(str, found["torchvision"]))
    for one, other in zip(delivered["dali"], delivered["torchvision"], strict=True):
        np.testing.assert_array_equal(one.sources, other.sources)
        assert_close(one.x1, other.x1)
        assert_close(one.x2, other.x2)


@needs_dali
@pytest.mark.parametrize(
    ("device", "times"),
    [
        pytest.param("cpu", 2, id="cpu"),
        pytest.param(
            "cuda",
            25,  # with several such batches each
            id="cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
            ],
        ),
    ],
)
def test_batches_with_replaced_images_are_the_same_every_time(device: str, times: int, undecodable: ShardSet) -> None:
    """They differ if memory is taken back while kernels read it. A GPU's decoder refuses the same images as PIL."""
    on_cpu, found = Reports(), Reports()
    expected = load(undecodable, settings("torchvision"), on_bad_sample=on_cpu.append)
    process = World.alone(torch.device(device))
    first = load(undecodable, settings("dali"), process=process, on_bad_sample=found.append)
    assert found.ids == on_cpu.ids == sorted(BAD)
    for ours, reference_views in zip(first, expected, strict=True):
        np.testing.assert_array_equal(ours.sources, reference_views.sources)
    for _ in range(times - 1):
        assert_same(load(undecodable, settings("dali"), process=process, on_bad_sample=found.append), first)


@needs_dali
def test_headers_are_parsed_by_the_threads_that_read_not_by_the_one_that_feeds_dali(
    photo_dataset_path: Path, photo_dataset: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.backends import dali_backend

    path = copy_dataset(photo_dataset_path, tmp_path / "headers")
    for sample in BAD:
        put_image(path, sample, b"no image at all" * 20)
    parsed, parse = [], dali_backend._header_fault

    def noted(image: Any) -> str | None:
        parsed.append(threading.current_thread().name)
        return parse(image)

    monkeypatch.setattr(dali_backend, "_header_fault", noted)
    reports = Reports()
    whole = load(ShardSet.open(path), settings("dali"), on_bad_sample=reports.append)
    assert_replaced(whole, load(photo_dataset, settings("dali")), BAD)
    assert reports.ids == sorted(BAD)
    assert len(parsed) >= 2 * 2 * 48  # of both loaders, in two epochs
    assert {name.partition("_")[0] for name in parsed} == {"read"}


@both_backends
@pytest.mark.parametrize("kind", ["photo_dataset", "changed", "undecodable"])
@pytest.mark.parametrize("taken", [1, None])
def test_a_loader_goes_when_it_is_left(
    kind: str, taken: int | None, backend: str, request: pytest.FixtureRequest
) -> None:
    """One in a cycle of references, with its threads and images, stays until a full collection: as good as for ever."""

    def use(dataset: ShardSet) -> None:
        load(dataset, settings(backend), taken, on_bad_sample=Reports().append)
        with open_images(
            dataset, RECIPE, settings(backend), ALONE, ids=np.arange(48), batch=12, on_bad_sample=Reports().append
        ) as batches:
            assert len(list(itertools.islice(batches, taken))) == (taken or 4)

    def living() -> int:
        kinds = (Assembler, BadSamples, BadSampleError, ThreadPoolExecutor)
        return sum(isinstance(thing, kinds) for thing in gc.get_objects())

    dataset = request.getfixturevalue(kind)
    gc.collect()
    gc.disable()
    try:
        before = living()
        use(dataset)
        assert living() == before
    finally:
        gc.enable()


@both_backends
def test_bad_samples_in_an_evaluation(undecodable: ShardSet, photo_dataset: ShardSet, backend: str) -> None:
    reports = Reports()
    made = torch.cat([x for x, _ in images(undecodable, backend, list(range(48)), on_bad_sample=reports.append)])
    clean = torch.cat([x for x, _ in images(photo_dataset, backend, list(range(48)))])
    assert torch.equal(made, clean[[BAD.get(sample, sample) for sample in range(48)]])
    assert reports.ids == sorted(BAD)


@both_backends
def test_without_checksums_a_changed_image_is_found_by_decoding(changed: ShardSet, backend: str) -> None:
    """Half of a PNG's and most of a JPEG's bytes may change without an error, so one that shows is made."""
    path = changed.path
    row = changed.samples[3]
    with open(changed.shard_path(int(row["shard"])), "r+b") as file:
        file.seek(int(row["offset"]))
        file.write(bytes(int(row["length"])))
    reports = Reports()
    load(ShardSet.open(path, verify_checksums=False), settings(backend), on_bad_sample=reports.append)
    assert 3 in reports.ids


@needs_dali
@pytest.mark.parametrize("kind", only_pil_decodes())
def test_an_image_that_only_pil_decodes_is_replaced_where_dali_runs(
    kind: str, photo_dataset_path: Path, photo_dataset: ShardSet, tmp_path: Path
) -> None:
    path = copy_dataset(photo_dataset_path, tmp_path / "odd")
    odd = only_pil_decodes()[kind]
    sample = int(np.argmax(photo_dataset.samples["length"]))  # there is room for it
    put_image(path, sample, odd, (48, 64))
    reports = Reports()
    whole = load(ShardSet.open(path), settings("dali"), on_bad_sample=reports.append)
    assert_replaced(whole, load(photo_dataset, settings("dali")), {sample: (sample + 1) % 48})
    assert [report.sample_id for report in reports] == [sample]
    assert reports[0].reason.startswith("cannot be decoded: DALI: ")
    silent = Reports()
    load(ShardSet.open(path), settings("torchvision"), on_bad_sample=silent.append)
    assert not silent


@both_backends
@pytest.mark.parametrize("kind", ["changed", "undecodable"])
def test_too_many_bad_samples_end_the_run_with_their_list(
    kind: str, backend: str, request: pytest.FixtureRequest
) -> None:
    dataset = request.getfixturevalue(kind)
    before = set(threading.enumerate())
    with pytest.raises(UserError, match="--max-bad-samples") as caught:
        load(dataset, settings(backend, max_bad_samples=2), on_bad_sample=Reports().append)
    named = [sample for sample in BAD if f"sample {sample} (key {dataset.key(sample)}" in str(caught.value)]
    assert len(named) >= 3  # another thread may find one more before the run ends
    assert set(threading.enumerate()) <= before


@both_backends
@pytest.mark.parametrize("kind", ["changed", "undecodable"])
def test_all_bad_ends_with_an_error(
    kind: str, backend: str, photo_dataset_path: Path, photo_dataset: ShardSet, tmp_path: Path
) -> None:
    path = copy_dataset(photo_dataset_path, tmp_path / "ruin")
    if kind == "changed":
        change_bytes(path, list(range(48)))
    else:
        for sample in range(48):
            put_image(path, sample, image_bytes(0)[:100])
    with pytest.raises(UserError, match=r"no sample of .* can be read"):
        load(ShardSet.open(path), settings(backend), on_bad_sample=Reports().append)


def test_the_default_report_is_a_line_on_stderr(changed: ShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    load(changed, settings("torchvision"), sampler={"epochs": 1})
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == len(BAD)
    for line in lines:
        assert line.startswith("bad sample, replaced by the next one: sample ")


def test_an_error_of_the_producer_reaches_the_training_loop(
    photo_dataset: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: object) -> None:
        raise MemoryError("no room for views")

    monkeypatch.setattr(loader_module, "draw_views", out_of_memory)
    with pytest.raises(MemoryError, match="no room for views"):
        load(photo_dataset, settings("torchvision"))


def test_several_loaders_in_several_threads(photo_dataset: ShardSet) -> None:
    alone = load(photo_dataset, settings("auto"))
    with ThreadPoolExecutor(3) as pool:
        for delivered in pool.map(lambda _: load(photo_dataset, settings("auto")), range(3)):
            assert_same(delivered, alone)


# Groups of views.

GROUPS = ViewRecipe(
    image_size=32,
    count=1,
    blur_prob=1.0,
    extra=Augmentations(vertical_flip=VerticalFlip(prob=0.5), erasing=Erasing(prob=0.3)),
    more_views=(
        ViewGroup(blur_prob=0.1, solarize_prob=0.5),
        ViewGroup(count=3, image_size=20, crop_scale=(0.05, 0.14), interpolation="bicubic"),
    ),
)


@both_backends
def test_all_groups_come_in_one_batch_and_are_the_references(photo_dataset: ShardSet, backend: str) -> None:
    with open_views(photo_dataset, GROUPS, settings(backend), BatchSampler(9, 12, epochs=1), ALONE) as batches:
        for batch in batches:
            assert [tuple(x.shape) for x in batch.views] == [
                (12, 3, own.image_size, own.image_size) for own in GROUPS.per_view
            ]
            params = draw_views(GROUPS, 9, 0, batch.ids, photo_dataset.sizes(batch.ids))
            images = [reference.decode(photo_dataset.read(int(sample))) for sample in batch.ids]
            for view, x in enumerate(batch.views):
                assert x.is_contiguous(memory_format=torch.channels_last)
                made = [reference.transform(pic, params, i, view, GROUPS) for i, pic in enumerate(images)]
                finished = [reference.finish(pic, params, i, view, GROUPS) for i, pic in enumerate(made)]
                assert_close(x, torch.stack(finished))


@both_backends
def test_more_groups_leave_the_first_views_as_they_are(photo_dataset: ShardSet, backend: str) -> None:
    more = replace(RECIPE, more_views=(ViewGroup(count=2, image_size=16),))
    with open_views(photo_dataset, more, settings(backend), BatchSampler(9, 12, epochs=2), ALONE) as batches:
        assert_same(list(batches), load(photo_dataset, settings(backend)))


@both_backends
def test_evaluation_and_crops_take_the_first_group(photo_dataset: ShardSet, backend: str) -> None:
    ids, sampler = np.arange(48), BatchSampler(9, 12, epochs=1)
    with open_images(photo_dataset, GROUPS, settings(backend), ALONE, ids=ids, batch=48) as batches:
        assert next(batches)[0].shape == (48, 3, 32, 32)
    plain = replace(GROUPS, more_views=())
    made = []
    for recipe in (GROUPS, plain):
        with open_crops(photo_dataset, recipe, settings(backend), sampler, ALONE, ids=ids) as crops:
            made.append(next(crops))
    assert [len(batch.views) for batch in made] == [1, 1]
    assert torch.equal(made[0].views[0], made[1].views[0])
