"""Bad images of every kind among good ones, and archives of any bytes: what is refused, is refused by name."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.common.errors import UserError
from pipeline.dataset.dataset import ShardSet
from pipeline.sharding.make_dataset import make_dataset
from pipeline.sharding.options import ShardingOptions
from pipeline.sources.image_file import BadImageError, inspect_image
from tests.helpers.encoded import bad_images, good_images
from tests.helpers.photos import image_bytes
from tests.pipeline.sources.test_image_file import BAD

LIMIT = 1_000_000  # pixels
GOOD = 5


def bad_kinds() -> dict[str, bytes]:
    kinds = {kind: make() for kind, (make, _) in BAD.items()} | bad_images()
    jpeg = image_bytes(1)
    kinds["a bomb"] = b"P5\n20000 20000\n255\n" + bytes(1000)
    kinds["too long a side"] = image_bytes(1, 1, 65_536, mode="L", encoding="PNG")
    kinds["a tar header"] = tarfile.TarInfo("x.jpg").tobuf()
    kinds["a pdf"] = b"%PDF-1.7\n" + bytes(100)
    kinds["one byte"] = b"\xff"
    kinds["a size of nothing"] = b"P6\n0 0\n255\n"
    kinds["a jpeg turned round"] = jpeg[::-1]
    return kinds


def source(form: str, folder: Path, kinds: dict[str, bytes]) -> tuple[str, dict[str, str]]:
    """Good and bad images in random order as a source, and how rejected.jsonl will call each of the bad ones."""
    (folder / "in" / "class").mkdir(parents=True)
    images = {f"bad{number:02d}": data for number, data in enumerate(kinds.values())}
    images |= {f"good{number}": image_bytes(number) for number in range(GOOD)}
    order = random.Random(0).sample(sorted(images), len(images))
    for name in order:
        (folder / "in" / "class" / f"{name}.jpg").write_bytes(images[name])
    named = dict(zip(kinds, sorted(name for name in images if name.startswith("bad")), strict=True))
    if form == "folder":
        return str(folder / "in"), {kind: f"class/{name}.jpg" for kind, name in named.items()}
    with tarfile.open(folder / "in.tar", "w") as tar:
        for name in order:
            tar.add(folder / "in" / "class" / f"{name}.jpg", f"class/{name}.jpg")
    if form == "tar":
        return str(folder / "in.tar"), {kind: f"class/{name}.jpg" for kind, name in named.items()}
    return f"wds:{folder / 'in.tar'}", {kind: f"in.tar/class/{name}" for kind, name in named.items()}


def damaged_headers(count: int) -> Iterator[bytes]:
    """JPEGs some of whose first bytes are zeroed, others, flipped or gone."""
    rng = np.random.default_rng(0)
    for number in range(count):
        data = bytearray(image_bytes(number % 7))
        start, length = int(rng.integers(2, 700)), int(rng.integers(1, 60))
        match number % 4:
            case 0:
                data[start : start + length] = bytes(length)
            case 1:
                data[start : start + length] = rng.bytes(length)
            case 2:
                data[start] ^= 1 << int(rng.integers(8))
            case 3:
                del data[start : start + length]
        yield bytes(data)


def test_damaged_headers_are_refused_where_dali_would_not_read_them() -> None:
    """Or back ends would train on different images: PIL, which judges, skips what DALI's decoder trips over."""
    nvimgcodec = pytest.importorskip("nvidia.nvimgcodec")

    def dali_reads(data: bytes) -> bool:
        try:
            return bool(nvimgcodec.CodeStream(np.frombuffer(data, np.uint8)).height)
        except RuntimeError:
            return False

    refused_by_dali = 0
    for data in damaged_headers(3000):
        try:
            inspect_image(data, "full", LIMIT)
        except BadImageError as error:
            if "do not follow each other" in str(error):
                assert not dali_reads(data)  # no more is refused than must be
                refused_by_dali += 1
        else:
            assert dali_reads(data)
    assert refused_by_dali > 20


@pytest.mark.parametrize("form", ["folder", "tar", "tar of others"])
def test_every_kind_of_bad_image_is_named_and_left_out_when_sharded(form: str, tmp_path: Path) -> None:
    kinds = bad_kinds()
    assert len(kinds) >= 30
    where, names = source(form, tmp_path, kinds)
    options = ShardingOptions(samples_per_shard=8, max_pixels=LIMIT)
    make_dataset(where, tmp_path / "out", options, quiet=True, in_process=True)
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert sorted(line["name"] for line in lines) == sorted(names.values())
    assert all(line["reason"] for line in lines)
    dataset = ShardSet.open(tmp_path / "out")
    assert sorted(map(dataset.read, range(len(dataset)))) == sorted(image_bytes(number) for number in range(GOOD))


@pytest.fixture(scope="module")
def good() -> list[bytes]:
    return list(good_images().values())


@settings(max_examples=300)
@given(data=st.data())
def test_images_of_any_bytes_are_judged_or_refused(good: list[bytes], data: st.DataObject) -> None:
    """Good ones with bytes overwritten, cut out or put in: never another error than the documented one."""
    content = bytearray(data.draw(st.sampled_from(good)))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, min(len(content) - 1, 400)))  # headers are where parsers stumble
        junk = data.draw(st.one_of(st.binary(max_size=6), st.sampled_from([b"\xff" * 4, bytes(4), b"\x7f\xff\xff"])))
        content[start : start + data.draw(st.integers(0, 6))] = junk
    for verify in ("header", "full"):
        with contextlib.suppress(BadImageError):
            image = inspect_image(bytes(content), verify, LIMIT)  # type: ignore[arg-type]
            assert 0 < image.height * image.width <= LIMIT


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A WebDataset tar of 6 labelled images."""
    folder = tmp_path_factory.mktemp("archive")
    for number in range(6):
        (folder / f"{number}.jpg").write_bytes(image_bytes(number, 24, 32))
        (folder / f"{number}.cls").write_text(str(number % 3))
    with tarfile.open(folder / "whole.tar", "w") as tar:
        for path in sorted(folder.glob("[0-9].*")):
            tar.add(path, path.name)
    return (folder / "whole.tar").read_bytes()


@pytest.mark.parametrize("form", ["tar", "tar of others"])
@settings(max_examples=80)
@given(data=st.data())
def test_archives_of_any_bytes_become_a_dataset_or_are_refused(form: str, archive: bytes, data: st.DataObject) -> None:
    content = bytearray(archive)
    for _ in range(data.draw(st.integers(1, 3))):
        block = 512 * data.draw(st.integers(0, len(content) // 512 - 1))
        start = block + data.draw(st.integers(0, 511))
        junk = data.draw(st.one_of(st.binary(max_size=8), st.sampled_from([b"7" * 11, b"\x80" + bytes(7), b"../../x"])))
        content[start : start + (len(junk) if data.draw(st.booleans()) else 3)] = junk
    folder = Path(tempfile.mkdtemp())
    try:
        (folder / "set.tar").write_bytes(content)
        where = f"{'wds:' if form == 'tar of others' else ''}{folder / 'set.tar'}"
        try:
            make_dataset(where, folder / "out", ShardingOptions(max_pixels=LIMIT), quiet=True, in_process=True)
        except UserError:
            return
        dataset = ShardSet.open(folder / "out")
        for sample_id in range(len(dataset)):
            inspect_image(dataset.read(sample_id), "full", LIMIT)
        assert sorted(path.name for path in folder.iterdir()) == ["out", "set.tar"]
    finally:
        shutil.rmtree(folder)
