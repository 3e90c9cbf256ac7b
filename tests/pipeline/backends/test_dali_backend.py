"""DALI's squares against PIL and torchvision, and what happens around an image that DALI cannot decode."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.backends import reference
from pipeline.backends.base import BackendContext, Batch, DaliConfig, UndecodableBatchError
from pipeline.common.errors import UserError
from pipeline.dataset.dataset import ShardSet
from pipeline.sampling.views import CentreCrops, ViewGroup, ViewParams, ViewRecipe, centre_crops, draw_views
from tests.helpers.encoded import HEIGHT, WIDTH, bad_images, batch_of, encode, good_images, only_pil_decodes
from tests.helpers.image_kinds import KINDS
from tests.helpers.photos import image_bytes, smooth_pixels

if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
    pytest.skip("needs NVIDIA DALI, which exists for Linux: pip install nvidia-dali-cuda130", allow_module_level=True)

from pipeline.backends import dali_backend as dali
from pipeline.backends.dali_backend import DaliSquares

SIDE = 40
RECIPE = ViewRecipe(image_size=SIDE)
CPU = torch.device("cpu")
DEVICES = [
    pytest.param(CPU, id="cpu"),
    pytest.param(
        torch.device("cuda"),
        id="cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
        ],
    ),
]


def squares_of(
    batches: Iterator[Batch], device: torch.device = CPU, side: int = SIDE, largest: int = 48
) -> DaliSquares:
    return DaliSquares(batches, ViewRecipe(image_size=side), largest, 2, device, DaliConfig())


def assert_close(made: torch.Tensor, expected: list[torch.Tensor]) -> None:
    """As close as the whole loader has to be: 0.5 of 255 in the mean, 99 % of the values within 4."""
    apart = (made.cpu().int() - torch.stack(expected).permute(0, 2, 3, 1).int()).abs().float()
    assert apart.mean() <= 0.5
    assert (apart <= 4).float().mean() >= 0.99


def photo_batch(dataset: ShardSet, side: int, centre: bool) -> tuple[Batch, list[torch.Tensor]]:
    ids = np.arange(dataset.num_samples)
    sizes, encoded = dataset.sizes(ids), [dataset.read(sample) for sample in ids]
    recipe = ViewRecipe(image_size=side)
    windows: ViewParams | CentreCrops = centre_crops(side, sizes) if centre else draw_views(recipe, 1, 0, ids, sizes)
    batch = Batch(0, 0, ids, ids, [np.frombuffer(data, dtype=np.uint8) for data in encoded], windows)
    return batch, [reference.decode(data) for data in encoded]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", [32, 96])
def test_squares_are_torchvisions(photo_dataset: ShardSet, side: int, device: torch.device) -> None:
    batch, images = photo_batch(photo_dataset, side, centre=False)
    delivered, squares = next(squares_of(iter([batch]), device, side))
    assert delivered is batch
    for view, made in enumerate(squares):
        assert made.dtype == torch.uint8
        assert made.is_contiguous()
        assert_close(made, [reference.resized_crop(pic, batch.windows, i, view, side) for i, pic in enumerate(images)])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", [32, 96])
def test_centre_squares_are_torchvisions(photo_dataset: ShardSet, side: int, device: torch.device) -> None:
    batch, images = photo_batch(photo_dataset, side, centre=True)
    _, (made,) = next(squares_of(iter([batch]), device, side))
    assert_close(made, [reference.centre_crop(pic, batch.windows, i, side) for i, pic in enumerate(images)])


def whole_image_batch(encoded: list[bytes], side: int) -> Batch:
    """Windows as large as the views, so that nothing is resized and every byte is the decoder's."""
    recipe = ViewRecipe(image_size=side)
    batch = batch_of(encoded, recipe)
    windows = batch.windows
    assert isinstance(windows, ViewParams)
    windows.crop[:, 0] = [0, 0, side, side]
    windows.crop[:, 1] = [HEIGHT - side, WIDTH - side, side, side]
    return batch


@pytest.mark.parametrize("device", DEVICES)
def test_all_kinds_of_images_decode_as_pil_decodes_them(device: torch.device) -> None:
    images = good_images()
    _, squares = next(squares_of(iter([whole_image_batch(list(images.values()), SIDE)]), device))
    for sample, (kind, encoded) in enumerate(images.items()):
        expected = reference.decode(encoded).permute(1, 2, 0).int()
        corners = expected[:SIDE, :SIDE], expected[HEIGHT - SIDE :, WIDTH - SIDE :]
        for made, corner in zip(squares, corners, strict=True):
            apart = (made[sample].cpu().int() - corner).abs()
            if "16 bits" in kind:  # DALI rounds what PIL cuts off
                assert apart.max() <= 1, kind
            elif device == CPU or "JPEG" not in kind:
                assert apart.max() == 0, kind
            else:  # nvJPEG's inverse DCT and chroma upsampling are its own
                assert apart.float().mean() <= 2, kind


def test_single_pixels_and_lines() -> None:
    images = [(1, 1), (1, 200), (200, 1), (2, 3)]
    encoded = [encode(Image.fromarray(smooth_pixels(i, *size)), "PNG") for i, size in enumerate(images)]
    ids = np.arange(len(images))
    params = draw_views(RECIPE, 0, 0, ids, np.array(images, dtype=np.int32))
    batch = Batch(0, 0, ids, ids, [np.frombuffer(data, dtype=np.uint8) for data in encoded], params)
    _, squares = next(squares_of(iter([batch])))
    for view, made in enumerate(squares):
        assert_close(
            made,
            [reference.resized_crop(reference.decode(data), params, i, view, SIDE) for i, data in enumerate(encoded)],
        )


def good_batch(step: int, count: int = 4) -> Batch:
    return batch_of([image_bytes(100 * step + i) for i in range(count)], RECIPE, step=step)


def assert_right(delivered: tuple[Batch, list[torch.Tensor]], expected: Batch) -> None:
    batch, squares = delivered
    assert batch is expected
    for view, made in enumerate(squares):
        assert len(made) == len(batch)
        images = [reference.decode(data.tobytes()) for data in batch.encoded]
        crops = [reference.resized_crop(pic, batch.windows, i, view, SIDE) for i, pic in enumerate(images)]
        assert_close(made, crops)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad_steps", [{0}, {3}, {7}, {2, 3}, {0, 1, 2}, {5, 7}, set(range(8))], ids=str)
def test_batches_around_undecodable_ones_are_right(bad_steps: set[int], device: torch.device) -> None:
    """Wherever they lie in DALI's queue: each is named once, and no other batch is lost, late or changed."""
    batches = [good_batch(step, count=3 if step == 7 else 4) for step in range(8)]
    kinds = list(bad_images().values())
    for step in bad_steps:
        batches[step].encoded[step % 3] = np.frombuffer(kinds[step % len(kinds)], dtype=np.uint8)
    squares = squares_of(iter(batches), device)
    for step, batch in enumerate(batches):
        if step in bad_steps:
            with pytest.raises(UndecodableBatchError) as caught:
                next(squares)
            assert caught.value.batch is batch
        else:
            assert_right(next(squares), batch)
    assert next(squares, None) is None
    assert next(squares, None) is None


@pytest.mark.parametrize("kind", bad_images() | only_pil_decodes())
def test_every_kind_of_undecodable_image_is_noticed(kind: str) -> None:
    batches = [good_batch(0), good_batch(1)]
    batches[0].encoded[1] = np.frombuffer((bad_images() | only_pil_decodes())[kind], dtype=np.uint8)
    squares = squares_of(iter(batches))
    with pytest.raises(UndecodableBatchError) as caught:
        next(squares)
    assert caught.value.reason.startswith("DALI: ")
    assert "\n" not in caught.value.reason
    assert_right(next(squares), batches[1])


def test_large_batches_with_undecodable_images_do_no_harm() -> None:
    """Left to itself DALI 2.4 ends the process at a header that it cannot read, but not in small batches."""
    script = Path(__file__).parents[3] / "tests" / "helpers" / "large_batches.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["outcomes"]) == 60
    assert result["outcomes"] == ["good" if kind == "good" else "refused" for kind in result["kinds"]]
    assert result["ended"]


@pytest.mark.parametrize("before", [0, 1, 2, 7])
def test_an_error_of_those_who_make_the_batches_is_no_images_fault(before: int) -> None:
    """DALI's own errors are RuntimeErrors too, and they are blamed on a batch."""

    def batches() -> Iterator[Batch]:
        yield from (good_batch(step) for step in range(before))
        raise RuntimeError("fetching failed")

    with pytest.raises(RuntimeError, match=r"^fetching failed$"):
        list(squares_of(batches()))


@pytest.mark.parametrize("spoiled", [[], [2], [1, 2], [0, 1, 2]])
@pytest.mark.parametrize("kind", ["text", "a JPEG without its end"])
@pytest.mark.parametrize("taken", [1, 3, 4])
def test_a_pipeline_goes_with_its_last_reference(spoiled: list[int], kind: str, taken: int) -> None:
    """One in a cycle of references lives on until the collector comes; a child forked meanwhile aborts on it."""
    batches = [good_batch(step) for step in range(3)]
    for step in spoiled:
        batches[step].encoded[1] = np.frombuffer(bad_images()[kind], dtype=np.uint8)
    gc.disable()
    try:
        squares = squares_of(iter(batches))
        gone = weakref.ref(squares._pipeline)
        for _ in range(taken):
            with contextlib.suppress(UndecodableBatchError):
                next(squares, None)
        assert gone() is not None
        del squares
        assert gone() is None
    finally:
        gc.enable()


def test_the_last_batch_may_be_smaller() -> None:
    batches = [good_batch(0, 5), good_batch(1, 5), good_batch(2, 2)]
    for made, batch in zip(squares_of(iter(batches), largest=5), batches, strict=True):
        assert_right(made, batch)


@pytest.mark.parametrize("device", DEVICES)
def test_squares_stay_as_they_were_while_later_batches_come(device: torch.device) -> None:
    """They share DALI's memory: it must not be used again as long as they live."""
    squares = squares_of((good_batch(step) for step in range(12)), device)
    held = [next(squares)[1] for _ in range(3)]
    copies = [[square.clone() for square in views] for views in held]
    rest = [next(squares)[1] for _ in range(5)]
    del rest
    list(squares)
    del squares
    for views, copied in zip(held, copies, strict=True):
        for view, copy in zip(views, copied, strict=True):
            assert torch.equal(view, copy)


def test_no_batches_at_all() -> None:
    assert next(squares_of(iter(())), None) is None


def test_an_error_in_the_making_of_batches_comes_through_as_it_is() -> None:
    def batches() -> Iterator[Batch]:
        yield good_batch(0)
        raise UserError("too many bad samples")

    with pytest.raises(UserError, match="too many bad samples"):
        list(squares_of(batches()))


def test_a_window_outside_the_image_is_an_error_not_wrong_pixels() -> None:
    batch = good_batch(0)
    assert isinstance(batch.windows, ViewParams)
    batch.windows.crop[2, 1] = [0, 0, HEIGHT + 1, 10]
    with pytest.raises(UndecodableBatchError, match="out of bounds"):
        next(squares_of(iter([batch])))


@pytest.mark.parametrize("decoder", ["mixed", "cpu"])
@pytest.mark.parametrize("centre", [False, True])
def test_the_graph_of_a_gpu_is_as_configured(
    decoder: Literal["mixed", "cpu"], centre: bool, photo_dataset: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made, but not built: that takes a GPU."""
    seen: dict[str, Any] = {}

    def image(encoded: Any, **options: Any) -> Any:
        seen.update(options)
        return decode(encoded, **options)

    decode = dali.fn.decoders.image
    monkeypatch.setattr(dali.fn.decoders, "image", image)
    monkeypatch.setattr(dali.Pipeline, "build", lambda pipeline: None)
    outputs: list[Any] = []
    monkeypatch.setattr(dali.Pipeline, "set_outputs", lambda pipeline, *nodes: outputs.extend(nodes))
    batch, _ = photo_batch(photo_dataset, SIDE, centre)
    config = DaliConfig(decoder=decoder, hw_decoder_load=0.5, smooth_chroma=True, device_memory_padding=32)
    sources: list[dict[str, Any]] = []
    external_source = dali.fn.external_source

    def source(**options: Any) -> Any:
        sources.append(options)
        return external_source(**options)

    monkeypatch.setattr(dali.fn, "external_source", source)
    DaliSquares(iter([batch]), RECIPE, len(batch), 2, torch.device("cuda", 0), config)
    assert [node.device for node in outputs] == ["gpu"] * (1 if centre else 2)
    assert seen["device"] == decoder
    assert seen["adjust_orientation"] is False
    if decoder == "mixed":
        assert (seen["hw_decoder_load"], seen["jpeg_fancy_upsampling"]) == (0.5, True)
        assert (seen["device_memory_padding"], seen["host_memory_padding"]) == (32 << 20, 8 << 20)
    assert all(source["no_copy"] is False for source in sources)  # a GPU reads inputs later


def test_windows_are_fed_as_an_array_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """DALI takes 13 us an image for lists, and less than 1 for arrays."""
    fed: list[Any] = []
    pull = dali._Inputs.pull

    def noted(inputs: Any) -> Any:
        fed.append(pull(inputs))
        return fed[-1]

    monkeypatch.setattr(dali._Inputs, "pull", noted)
    next(squares_of(iter([good_batch(0)])))
    _, *windows = fed[0]
    assert [type(window) for window in windows] == [np.ndarray] * 4
    assert {window.shape for window in windows} == {(4, 2)}


def test_what_is_set_aside_for_the_decoders_is_said() -> None:
    text = DaliConfig(preallocate_side=4000).describe_memory(512, 4)
    assert text is not None
    assert "hardware decoder 16.0 GB (--dali.preallocate-side)" in text
    assert "the other 64 MiB and 64 MiB pinned" in text
    assert "no memory ahead" in str(DaliConfig().describe_memory(512, 4))
    assert DaliConfig(decoder="cpu").describe_memory(512, 4) is None
    with pytest.raises(UserError, match=r"--dali\.host-memory-padding"):
        DaliConfig(host_memory_padding=-1)


def test_a_gpu_keeps_squares_when_their_iterator_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a replaced image: the batch is made by an iterator of its own, whose kernels are still queued."""

    class Event:
        def query(self) -> bool:
            return False

    class Stream:
        def record_event(self) -> Event:
            return Event()

    made: list[weakref.ref[torch.Tensor]] = []

    def cut(context: Any, batches: Iterator[Batch]) -> Iterator[Any]:
        for batch in batches:
            squares = torch.zeros(len(batch), 2, 2, 3, dtype=torch.uint8)
            made.append(weakref.ref(squares))
            yield batch, [squares]

    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: Stream())
    monkeypatch.setattr(dali, "cut_squares", cut)
    monkeypatch.setattr(dali, "_photometric", lambda context: lambda squares, windows: [torch.zeros(4, 3, 2, 2)] * 2)
    pool = ThreadPoolExecutor(1)
    context = BackendContext(RECIPE, DaliConfig(), 4, torch.device("cuda", 0), torch.float32, pool, 1)
    backend = dali.DaliBackend()
    next(backend.views(context, iter([good_batch(0)])))
    gc.collect()
    assert made[0]() is not None
    del backend
    gc.collect()
    assert made[0]() is None


def test_an_error_of_the_gpu_is_no_images_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    squares = squares_of(iter([good_batch(0)]))
    message = "Error in GPU operator: CUDA runtime API error cudaErrorIllegalAddress (700):"

    def run(*_: Any) -> Any:
        raise RuntimeError(message)

    monkeypatch.setattr(squares._pipeline, "run", run)
    with pytest.raises(RuntimeError, match="cudaErrorIllegalAddress"):
        next(squares)


GROUPS = ViewRecipe(
    image_size=96,
    more_views=(ViewGroup(count=3, image_size=40, crop_scale=(0.05, 0.14)), ViewGroup(interpolation="bicubic")),
)


@pytest.mark.parametrize("device", DEVICES)
def test_each_group_of_views_has_its_own_size_and_interpolation(photo_dataset: ShardSet, device: torch.device) -> None:
    """In one graph, which decodes each image once."""
    ids = np.arange(photo_dataset.num_samples)
    encoded = [np.frombuffer(photo_dataset.read(sample), np.uint8) for sample in ids]
    batch = Batch(0, 0, ids, ids, encoded, draw_views(GROUPS, 1, 0, ids, photo_dataset.sizes(ids)))
    _, squares = next(DaliSquares(iter([batch]), GROUPS, len(ids), 2, device, DaliConfig()))
    assert [tuple(made.shape) for made in squares] == [
        (48, own.image_size, own.image_size, 3) for own in GROUPS.per_view
    ]
    images = [reference.decode(data.tobytes()) for data in encoded]
    for view, (made, own) in enumerate(zip(squares, GROUPS.per_view, strict=True)):
        size = own.image_size, own.interpolation
        assert_close(made, [reference.resized_crop(pic, batch.windows, i, view, *size) for i, pic in enumerate(images)])


def test_an_image_is_decoded_once_for_all_its_views(photo_dataset: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    decoders: list[Any] = []
    decode = dali.fn.decoders.image
    monkeypatch.setattr(dali.fn.decoders, "image", lambda *a, **k: decoders.append(decode(*a, **k)) or decoders[-1])
    ids = np.arange(4)
    encoded = [np.frombuffer(photo_dataset.read(sample), np.uint8) for sample in ids]
    batch = Batch(0, 0, ids, ids, encoded, draw_views(GROUPS, 1, 0, ids, photo_dataset.sizes(ids)))
    assert len(next(DaliSquares(iter([batch]), GROUPS, 4, 2, CPU, DaliConfig()))[1]) == 6
    assert len(decoders) == 1


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("PNG, wrong checksum of the pixels", "IDAT: CRC error"),
        ("PNG, half of the rows", "Not enough image data"),
        ("BMP, 5-5-5", "Invalid sample_type"),
        ("PGM as text, without a newline at its end", "Unexpected end of input stream"),
    ],
)
def test_the_reason_is_the_codecs_own_message(kind: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    images = dali.DaliImages(iter([batch_of([KINDS[kind]()], RECIPE)]), 1, 1, torch.device("cpu"), DaliConfig())
    with pytest.raises(UndecodableBatchError) as caught:
        next(images)
    assert message in caught.value.reason
    assert not caught.value.reason.endswith(":")
    assert "\n" not in caught.value.reason
