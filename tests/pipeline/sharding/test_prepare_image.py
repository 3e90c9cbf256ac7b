"""Every back end gets the same pixels: what is kept, re-encoded or refused, and that docs/formats.md says so."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.backends import reference
from pipeline.checking.check_dataset import inspect_dataset
from pipeline.checking.check_shard import CheckOptions
from pipeline.common.errors import UserError
from pipeline.dataset.dataset import ShardSet
from pipeline.sharding import decode_service
from pipeline.sharding.decode_service import DecodeService, OwnDecoders
from pipeline.sharding.make_dataset import make_dataset
from pipeline.sharding.options import ShardingOptions
from pipeline.sharding.prepare_image import prepare_image
from pipeline.sources.image_file import BadImageError, inspect_image
from pipeline.sources.plain_png import is_plain_png
from tests.helpers.any_image import damaged, random_image
from tests.helpers.encoded import HEIGHT, WIDTH, encode
from tests.helpers.image_kinds import KINDS, huge_jpeg, many_scans
from tests.helpers.photos import image_bytes
from tools.make_shards import window_as_flag

if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
    pytest.skip("NVIDIA DALI is not installed", allow_module_level=True)

from pipeline.backends.dali_backend import CodecError, DaliDecoder

FORMATS = Path(__file__).parents[3] / "docs" / "formats.md"
RANDOM_IMAGES = 2000
BUDGET_S = 20.0  # for the worst image of the default --max-pixels, on a busy machine


@pytest.fixture(scope="module")
def decoders() -> OwnDecoders:
    return OwnDecoders()


@pytest.fixture(scope="module")
def dali() -> DaliDecoder:
    return DaliDecoder()


def by_pil(data: bytes) -> np.ndarray:
    return reference.decode(data).permute(1, 2, 0).numpy().astype(int)


def outcome(data: bytes, options: ShardingOptions, decoders: OwnDecoders) -> str:
    """What sharding does with an image, as docs/formats.md says it."""
    try:
        image = prepare_image(data, options, decoders)
    except BadImageError as error:
        return f"refused: {str(error).removesuffix('; --reencode stores the pixels that PIL decodes')}"
    if image.change is None:
        assert image.data == data
        return "kept"
    assert image.extension == "png"
    assert is_plain_png(image.data)
    return "8-bit PNG, full range" if image.change.startswith("8 bits") else "PNG of PIL's pixels"


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_treated_as_the_documentation_says(kind: str, decoders: OwnDecoders) -> None:
    data = KINDS[kind]()
    plain, reencoded = (outcome(data, ShardingOptions(reencode=reencode), decoders) for reencode in (False, True))
    line = f"| {kind} | {plain} | {'the same' if reencoded == plain else reencoded} |"
    assert line in FORMATS.read_text(), f"docs/formats.md lacks this line:\n{line}"


def test_the_documentation_has_no_other_lines() -> None:
    lines = re.findall(r"^\| ((?:JPEG|PNG|WebP|BMP|TIFF|P.M|GIF|ICO)\b.*?) \| .* \| .* \|$", FORMATS.read_text(), re.M)
    assert lines == list(KINDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reencode", [False, True])
def test_what_is_accepted_has_the_same_pixels_everywhere(
    kind: str, reencode: bool, decoders: OwnDecoders, dali: DaliDecoder
) -> None:
    try:
        image = prepare_image(KINDS[kind](), ShardingOptions(reencode=reencode, sixteen_bit="full-range"), decoders)
    except BadImageError:
        return
    pixels = by_pil(image.data)
    assert pixels.shape == (image.height, image.width, 3)
    assert np.abs(pixels - dali.decode(np.frombuffer(image.data, np.uint8))).max() <= 2


def compare_at_random(count: int, decoders: OwnDecoders, dali: DaliDecoder) -> tuple[int, int]:
    """Shard random images, half of them damaged, and compare both back ends; gives how many were accepted, refused."""
    rng, accepted, reasons = random.Random(7), 0, []
    for number in range(count):
        what, data = random_image(rng)
        if number % 2:
            data = damaged(data, rng)
        options = ShardingOptions(reencode=number % 3 == 0, sixteen_bit="min-max" if number % 5 == 0 else "auto")
        try:
            image = prepare_image(data, options, decoders)
        except BadImageError as error:
            reasons.append(str(error))
            continue
        accepted += 1
        try:
            pixels = dali.decode(np.frombuffer(image.data, np.uint8))
        except CodecError as error:
            raise AssertionError(f"{what} was accepted, and DALI: {error}") from None
        assert np.abs(by_pil(image.data) - pixels).max() <= 2, what
    assert all(reasons)
    return accepted, len(reasons)


def test_random_images_have_no_silent_difference(decoders: OwnDecoders, dali: DaliDecoder) -> None:
    """In all formats and modes that PIL can write."""
    accepted, refused = compare_at_random(RANDOM_IMAGES, decoders, dali)
    assert accepted > RANDOM_IMAGES / 3
    assert refused > RANDOM_IMAGES / 10


@pytest.mark.faults
def test_many_random_images_have_no_silent_difference(decoders: OwnDecoders, dali: DaliDecoder) -> None:
    accepted, _ = compare_at_random(20 * RANDOM_IMAGES, decoders, dali)
    assert accepted > 10_000


def test_plain_pngs_need_no_decoder_to_be_equal(dali: DaliDecoder) -> None:
    """What stands in for the comparison refuses the same: no damage passes it that DALI would see."""
    rng, passed = random.Random(3), 0
    while passed < 150:
        what, data = random_image(rng, "PNG")
        if rng.random() < 0.8:
            data = damaged(data, rng)
        if is_plain_png(data):
            passed += 1
            assert np.array_equal(by_pil(data), dali.decode(np.frombuffer(data, np.uint8))), what


def gray16(values: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(values.astype(np.uint16)).save(out, "PNG")
    return out.getvalue()


RAMP = np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).round()


@pytest.mark.parametrize(
    ("rule", "window", "values", "low", "high"),
    [
        ("full-range", None, RAMP, 0, 65535),
        ("full-range", None, RAMP // 16, 0, 65535),
        ("auto", None, RAMP, 0, 65535),
        ("auto", None, 20000 + RAMP // 1.9, 0, 65535),
        ("min-max", None, 1000 + RAMP // 16, 1000, 1000 + 4095),
        ("min-max", None, np.full((HEIGHT, WIDTH), 700), 700, 701),
        ("window", (100, 3000), RAMP // 16, 100, 3000),
    ],
)
@pytest.mark.parametrize("shorter_side", [None, 32])
def test_sixteen_bits_become_eight_by_the_rule(
    rule: Any, window: Any, values: np.ndarray, low: int, high: int, shorter_side: int | None, decoders: OwnDecoders
) -> None:
    options = ShardingOptions(sixteen_bit=rule, sixteen_bit_window=window, shorter_side=shorter_side, jpeg_quality=100)
    image = prepare_image(gray16(values), options, decoders)
    expected = np.rint(np.clip((values - low) / (high - low), 0, 1) * 255)
    if shorter_side is None:
        assert np.array_equal(by_pil(image.data)[..., 0], expected)
    else:
        resized = Image.fromarray(expected.astype(np.uint8)).resize((image.width, 32), Image.Resampling.BICUBIC)
        assert np.abs(by_pil(image.data)[..., 0] - np.asarray(resized).astype(int)).mean() < 3


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "12-bit data" in kind])
def test_twelve_bits_in_sixteen_are_refused_unless_a_rule_is_given(kind: str, decoders: OwnDecoders) -> None:
    data = KINDS[kind]()
    with pytest.raises(BadImageError, match=r"fewer than 4096 of 65536.*--sixteen-bit full-range, min-max"):
        prepare_image(data, ShardingOptions(shorter_side=32), decoders)
    levels = np.unique(by_pil(prepare_image(data, ShardingOptions(sixteen_bit="min-max"), decoders).data))
    assert len(levels) > 200
    with pytest.raises(BadImageError, match="--sixteen-bit refuse"):
        prepare_image(data, ShardingOptions(sixteen_bit="refuse"), decoders)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("TIFF, gray of 16 bits", "TIFF, gray of 16 bits, big-endian"),
        ("TIFF, gray of 16 bits", "PNG, gray of 16 bits"),
        ("TIFF, gray of 16 bits", "PGM, maxval 65535"),
        ("TIFF, gray of 16 bits", "PNG, gray of 16 bits with alpha"),
        ("TIFF, RGB of 16 bits", "TIFF, RGB of 16 bits, big-endian"),
        ("TIFF, RGB of 16 bits", "PNG, RGB of 16 bits"),
        ("TIFF, RGB of 16 bits", "PNG, RGB of 16 bits with alpha"),
        ("TIFF, RGB of 16 bits", "PPM, maxval 65535"),
    ],
)
@pytest.mark.parametrize("rule", ["full-range", "min-max", "window"])
def test_sixteen_bits_are_read_alike_from_all_formats(one: str, other: str, rule: Any, decoders: OwnDecoders) -> None:
    options = ShardingOptions(sixteen_bit=rule, sixteen_bit_window=(9000, 40000) if rule == "window" else None)
    pixels = [by_pil(prepare_image(KINDS[kind](), options, decoders).data) for kind in (one, other)]
    assert np.array_equal(*pixels)
    assert len(np.unique(pixels[0])) > 100  # the low bytes count


def test_white_is_zero_is_inverted(decoders: OwnDecoders) -> None:
    options = ShardingOptions(sixteen_bit="full-range")
    black, white = (
        by_pil(prepare_image(KINDS[kind](), options, decoders).data)
        for kind in ("TIFF, gray of 16 bits", "TIFF, gray of 16 bits, white is zero")
    )
    assert np.abs(black + white - 255).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sixteen_bit": "window"}, "needs two values"),
        ({"sixteen_bit_window": (1, 2)}, "needs two values"),
        ({"sixteen_bit": "window", "sixteen_bit_window": (5, 5)}, "0 <= LO < HI <= 65535"),
        ({"sixteen_bit": "window", "sixteen_bit_window": (0, 70000)}, "0 <= LO < HI <= 65535"),
    ],
)
def test_windows_that_make_no_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ShardingOptions(**arguments)


def test_a_window_is_written_behind_its_rule() -> None:
    given = ["in", "out", "--sixteen-bit", "window", "100", "4000", "--seed", "3"]
    wanted = ["in", "out", "--sixteen-bit", "window", "--sixteen-bit-window", "100", "4000", "--seed", "3"]
    assert window_as_flag(given) == window_as_flag(wanted) == wanted
    assert window_as_flag(["in", "out", "--sixteen-bit", "min-max"]) == ["in", "out", "--sixteen-bit", "min-max"]


def write_kinds(folder: Path, kinds: list[str]) -> Path:
    folder.mkdir()
    for number, kind in enumerate(kinds):
        suffix = {"P": "png", "B": "bmp", "T": "tif"}.get(kind[0], "jpg")
        (folder / f"{number}.{suffix}").write_bytes(KINDS[kind]())
    return folder


MIXED = ["JPEG, RGB", "BMP, 5-5-5", "PGM, maxval 100", "TIFF, RGB", "PNG, gray of 16 bits", "JPEG, truncated"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataset_records_what_was_reencoded(workers: int, tmp_path: Path) -> None:
    source = write_kinds(tmp_path / "in", MIXED)
    options = ShardingOptions(reencode=True, workers=workers, samples_per_shard=2)
    summary = make_dataset(str(source), tmp_path / "out", options, quiet=True, in_process=not workers)
    assert (summary.images, sum(summary.rejected.values()), sum(summary.reencoded.values())) == (5, 1, 3)
    lines = [json.loads(line) for line in (tmp_path / "out" / "reencoded.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["1.bmp", "2.png", "4.png"]
    info = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert (info["recipe"]["sixteen_bit"], info["recipe"]["reencode"], info["compared"]) == (
        "auto", True, ["torchvision", "dali"])  # fmt: skip
    assert inspect_dataset(tmp_path / "out", CheckOptions(decode="full"), quiet=True).fine
    (tmp_path / "out" / "reencoded.jsonl").unlink()
    assert "reencoded.jsonl" in str(inspect_dataset(tmp_path / "out", CheckOptions(), quiet=True).damage[0])


def test_a_dataset_of_an_earlier_version_is_checked_by_all_decoders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_kinds(tmp_path / "in", MIXED)
    with monkeypatch.context() as patch:  # as if nothing were compared
        patch.setattr("pipeline.sharding.prepare_image.find_fault", lambda *_: None)
        make_dataset(str(source), tmp_path / "out", ShardingOptions(), quiet=True, in_process=True)
    assert inspect_dataset(tmp_path / "out", CheckOptions(), quiet=True).fine
    found = inspect_dataset(tmp_path / "out", CheckOptions(decode="full"), quiet=True)
    assert len(found.damage) == 1
    assert found.damage[0].kind == "has images that back ends do not decode alike"
    assert found.damage[0].count == 2


def test_indexed_tars_leave_out_what_differs(tmp_path: Path) -> None:
    import tarfile

    source = write_kinds(tmp_path / "in", [*MIXED, "PNG, gray of 16 bits with 12-bit data"])
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for file in sorted(source.iterdir()):
            tar.add(file, file.name)
    wds = f"wds:{tmp_path / 'set.tar'}"
    make_dataset(wds, tmp_path / "out", ShardingOptions(), quiet=True, in_process=True)
    assert len(ShardSet.open(tmp_path / "out")) == 3
    assert inspect_dataset(tmp_path / "out", CheckOptions(decode="full"), quiet=True).fine
    for options in ({"reencode": True}, {"sixteen_bit": "min-max"}):
        with pytest.raises(UserError, match="does not go with wds:"):
            make_dataset(wds, tmp_path / "other", ShardingOptions(**options), quiet=True, in_process=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(lambda: many_scans(5000), id="scans"),
        pytest.param(lambda: huge_jpeg(65535, 65535), id="65535 x 65535"),
        pytest.param(lambda: huge_jpeg(10_000, 10_000), id="no data"),
        pytest.param(lambda: image_bytes(1, 2000, 2000, quality=20, restart_marker_blocks=1), id="restarts"),
        pytest.param(
            lambda: image_bytes(1)[: image_bytes(1).index(b"\xff\xda") + 14] + b"\xff\xd0" * 3_000_000 + b"\xff\xd9",
            id="a flood of restarts",
        ),
        pytest.param(lambda: encode(Image.new("1", (9000, 9000)), "PNG"), id="81 million pixels"),
    ],
)
def test_bombs_take_a_bounded_time(data: Any) -> None:
    encoded, began = data(), time.process_time()
    with contextlib.suppress(BadImageError):
        inspect_image(encoded, "full", ShardingOptions.max_pixels)
    assert time.process_time() - began < BUDGET_S


@pytest.fixture
def service() -> Any:
    with DecodeService() as service:
        yield service


def ask(service: DecodeService, data: bytes) -> str | None:
    """A client's question, asked in a thread, while this one starts the service."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(service.client.fault, data)
        while not answer.done():
            service.start_if_wanted()
            time.sleep(0.05)
        return answer.result()


def test_the_service_answers_and_survives_its_children(service: DecodeService, decoders: OwnDecoders) -> None:
    bmp = KINDS["BMP, 5-5-5"]()
    assert ask(service, bmp) == decoders.fault(bmp)
    assert ask(service, KINDS["TIFF, RGB"]()) is None
    _, child = service.client._connected()
    os.kill(child, signal.SIGKILL)
    assert ask(service, bmp) == decoders.fault(bmp)


def test_a_decoder_that_hangs_is_ended_and_the_image_named(
    service: DecodeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_service, "DECODE_S", 0.0)
    reason = ask(service, KINDS["TIFF, RGB"]())
    assert reason is None or "takes longer than" in reason
    monkeypatch.setattr(decode_service, "DECODE_S", 60.0)
    assert ask(service, KINDS["TIFF, RGB"]()) is None


def test_a_decoder_that_crashes_is_a_reason(service: DecodeService, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def crash(self: Any) -> Any:
        connection, child = original(self)
        asked.append(child)
        os.kill(child, signal.SIGKILL)
        return connection, child

    original = type(service.client)._connected
    monkeypatch.setattr(type(service.client), "_connected", crash)
    assert ask(service, KINDS["TIFF, RGB"]()) == "a decoder crashes on it"
    assert len(asked) == 2
