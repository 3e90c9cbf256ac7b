"""Parquet files as Hugging Face and others lay them out: splits, columns, labels, and what is refused."""

from __future__ import annotations

import io
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.common.errors import UserError
from pipeline.sources.open_source import open_source
from pipeline.sources.parquet_layout import split_of
from pipeline.sources.readers import Source
from tests.helpers.photos import image_bytes

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

IMAGES = [image_bytes(n, 16, 16) for n in range(3)]


def write(path: Path, features: dict[str, Any] | None = None, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)
    return path


def images(count: int = 3) -> list[dict[str, Any]]:
    return [{"bytes": IMAGES[n % 3], "path": f"{n}.jpg"} for n in range(count)]


def opened(path: Path, **options: Any) -> Source:
    spool = path.parent / "spool"
    spool.mkdir(exist_ok=True)
    return open_source(str(path), spool, **options)


def labels_of(path: Path, **options: Any) -> tuple[tuple[str, ...], list[int]]:
    listing = opened(path, **options).listing
    return listing.classes, listing.labels.tolist()


def bytes_of(source: Source) -> list[bytes]:
    return [source.reader.read(source.listing, index) for index in range(len(source.listing))]


SPLITS = {
    "data/train-00000-of-00002.parquet": "train",
    "data/train-00001-of-00002-a09b74b3ef9c3b56.parquet": "train",
    "data/validation_matched-00000-of-00001.parquet": "validation_matched",
    "my-data-train.parquet": "train",
    "default/train/0000.parquet": "train",
    "default/partial-train/0000.parquet": "train",
    "default/extra/0000.parquet": "extra",
    "valid/part-7.parquet": "validation",
    "x_dev.parquet": "validation",
    "Testing.parquet": "test",
    "data/0000.parquet": None,
    "train_test.parquet": None,
    "restrained.parquet": None,
}


@pytest.mark.parametrize("name", SPLITS)
def test_the_split_that_a_path_names(name: str) -> None:
    assert split_of(Path(name)) == SPLITS[name]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("my-data-train.parquet", "my-data-test.parquet"),
        ("default/train/0000.parquet", "default/test/0000.parquet"),
        ("train/0.parquet", "eval/0.parquet"),
        ("train.parquet", "other.parquet"),
    ],
)
def test_several_splits_are_refused_or_chosen(train: str, test: str, tmp_path: Path) -> None:
    write(tmp_path / "hf" / train, image=images(2), label=[0, 1])
    write(tmp_path / "hf" / test, image=images(3), label=[1, 0, 1])
    with pytest.raises(UserError, match=r"of the splits .*: choose with --split"):
        opened(tmp_path / "hf")
    assert labels_of(tmp_path / "hf", split="train") == (("0", "1"), [0, 1])
    if "other" not in test:
        assert labels_of(tmp_path / "hf", split="test") == (("0", "1"), [1, 0, 1])
        assert len(opened(tmp_path / "hf", split="train+test").listing) == 5
    with pytest.raises(UserError, match="none of --split val"):
        opened(tmp_path / "hf", split="val")


def test_a_single_split_is_taken_and_a_name_of_ones_own_is_only_recorded(tmp_path: Path) -> None:
    write(tmp_path / "hf" / "data" / "train-00000-of-00001.parquet", image=images())
    for split in (None, "train", "mine"):
        assert len(opened(tmp_path / "hf", split=split).listing) == 3
    with pytest.raises(UserError, match="of the splits train: choose"):
        opened(tmp_path / "hf", split="test")


def test_files_of_one_name_in_several_folders_lose_no_image(tmp_path: Path) -> None:
    for piece in range(2):
        write(tmp_path / "hf" / f"chunk-{piece}" / "train" / "0000.parquet", image=images(2))
    source = opened(tmp_path / "hf")
    assert (len(source.listing), source.listing.rejected) == (4, ())
    write(tmp_path / "two" / "en" / "train" / "0000.parquet", image=images(2))
    write(tmp_path / "two" / "de" / "train" / "0000.parquet", image=images(2))
    with pytest.raises(UserError, match=r"folders de, en, as configurations.*--subtree de/"):
        opened(tmp_path / "two")
    assert len(opened(tmp_path / "two", subtree="de").listing) == 2


def test_file_names_are_never_classes(tmp_path: Path) -> None:
    for number in range(2):
        write(tmp_path / "hf" / f"train-{number:05d}-of-00002.parquet", image=images(2))
    for labels in ("auto", "none"):
        source = opened(tmp_path / "hf", labels=labels)
        assert (source.listing.classes, source.labels_from, set(source.listing.labels)) == ((), None, {-1})
    write(tmp_path / "named" / "cats.parquet", image=images(2))
    write(tmp_path / "named" / "dogs.parquet", image=images(2))
    assert labels_of(tmp_path / "named") == ((), [-1] * 4)
    with pytest.raises(UserError, match="no folders"):
        opened(tmp_path / "named", labels="folders")


GOOD_LABELS = {
    "int64": (pa.array([2, 0, 1]), ("0", "1", "2"), [2, 0, 1]),
    "int64 with none": (pa.array([2, None, -1]), ("0", "1", "2"), [2, -1, -1]),
    "uint64": (pa.array([2, 0, 1], pa.uint64()), ("0", "1", "2"), [2, 0, 1]),
    "bool": (pa.array([True, False, None]), ("0", "1"), [1, 0, -1]),
    "integral floats": (pa.array([2.0, float("nan"), None]), ("0", "1", "2"), [2, -1, -1]),
    "half floats": (pa.array(np.array([1, 0, 1], np.float16)), ("0", "1"), [1, 0, 1]),
    "decimals": (pa.array([1, 0, 1]).cast(pa.decimal128(19)), ("0", "1"), [1, 0, 1]),
    "dictionary of words": (pa.array(["b", "a", "b"]).dictionary_encode(), ("a", "b"), [1, 0, 1]),
    "dictionary of numbers": (pa.array([1, 0, 1]).dictionary_encode(), ("0", "1"), [1, 0, 1]),
    "large strings": (pa.array(["b", None, "a"], pa.large_string()), ("a", "b"), [1, -1, 0]),
    "string views": (pa.array(["b", None, "a"], pa.string_view()), ("a", "b"), [1, -1, 0]),
    "numbers as words": (pa.array(["10", "9", "10"]), ("9", "10"), [1, 0, 1]),
    "nothing": (pa.array([None, None, None], pa.int32()), (), [-1, -1, -1]),
}


@pytest.mark.parametrize("kind", GOOD_LABELS)
def test_labels_of_every_type(kind: str, tmp_path: Path) -> None:
    column, classes, labels = GOOD_LABELS[kind]
    assert labels_of(write(tmp_path / "x.parquet", image=images(), label=column)) == (classes, labels)


BAD_LABELS = {
    "50 million": ([50_000_000, 3, 7], r"row 0 of .*x\.parquet, column label: the label 50,000,000 .* for 3 images"),
    "beyond int32": ([1, 2**31, 0], "row 1 of"),
    "beyond int64": (pa.array([1, 0, 2**64 - 1], pa.uint64()), "row 2 of"),
    "negative": ([0, -2, 0], "row 1 of .*the label -2 .*no class"),
    "fractions": ([0.0, 0.5, 1.0], r"row 1 of .*the label 0\.5"),
    "infinite": ([0.0, 1.0, float("inf")], "row 2 of .*the label inf"),
    "an empty word": (["a", "", "b"], "row 1 of .*the label ''"),
    "two spellings": (["1", "01", "2"], "are one number"),
    "-1 as a word": (["-1", "0", "2"], "the class -1 beside 0"),
    "lists": ([[0], [1], [0, 1]], "the column label holds list<.*> not one class|the column label holds list"),
    "dates": (pa.array([0, 1, 2], pa.date32()), "the column label holds date32"),
    "bytes": ([b"a", b"b", b"c"], "the column label holds images"),
}


@pytest.mark.parametrize("kind", BAD_LABELS)
def test_labels_that_are_no_classes_are_refused_at_once(kind: str, tmp_path: Path) -> None:
    column, message = BAD_LABELS[kind]
    path = write(tmp_path / "x.parquet", image=images(), label=column)
    started = time.monotonic()
    with pytest.raises(UserError, match=message):
        opened(path)
    assert time.monotonic() - started < 5
    assert len(opened(path, labels="none", image_column="image").listing) == 3


def test_class_labels_under_any_name(tmp_path: Path) -> None:
    features = {"breed": {"names": ["pug", "cat"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    path = write(tmp_path / "x.parquet", features, id=[7, 8, 9], breed=[1, 0, -1], image=images())
    assert labels_of(path) == (("pug", "cat"), [1, 0, -1])
    assert opened(path).labels_from == "the column breed"
    path = write(tmp_path / "y.parquet", features, breed=[1, 2, 0], image=images())
    with pytest.raises(UserError, match=r"row 1 of .*the label 2 is none of the 2 named classes"):
        opened(path)
    features["kind"] = {"names": ["x"], "_type": "ClassLabel"}
    path = write(tmp_path / "z.parquet", features, kind=[0, 0, 0], breed=[1, 1, 0], image=images())
    with pytest.raises(UserError, match="the columns kind, breed are all class labels"):
        opened(path)
    assert labels_of(path, label_column="breed") == (("pug", "cat"), [1, 1, 0])
    with pytest.raises(UserError, match=r"--label-column race: there is no such column; there are kind, breed, image"):
        opened(path, label_column="race")


def png_mask() -> bytes:
    return image_bytes(5, 16, 16, mode="L", encoding="PNG")


def test_the_image_column_among_others(tmp_path: Path) -> None:
    wave = b"RIFF\0\0\0\0WAVEfmt " + bytes(40)
    sound, masks = [{"bytes": wave, "path": "a.wav"}] * 3, [{"bytes": png_mask(), "path": "m.png"}] * 3
    hf = {name: {"_type": kind} for name, kind in (("a", "Audio"), ("m", "Image"), ("image", "Image"))}
    for columns, features in (
        ({"audio": sound, "image": images()}, None),
        ({"mask": masks, "image": images()}, None),
        ({"a": sound, "m": masks, "image": images()}, hf),
        ({"hash": [b"x" * 32] * 3, "embedding": [b"y"] * 3, "pixels": IMAGES}, None),
        ({"sound": sound, "frame": images()}, None),
        ({"segmentation_mask": masks, "frame": images()}, None),
        ({"image.bytes": IMAGES, "n": [1, 2, 3]}, None),
        ({"image": pa.array(IMAGES, pa.large_binary())}, None),
        ({"image": pa.array(IMAGES, pa.binary_view())}, None),
        ({"image": pa.array([IMAGES[0], IMAGES[1], IMAGES[2]]).dictionary_encode()}, None),
    ):
        source = opened(write(tmp_path / "x.parquet", features, **columns))
        assert bytes_of(source) == IMAGES, columns.keys()
        assert len(source.notes) == (len(columns) > 1 and "n" not in columns)
    path = write(tmp_path / "two.parquet", left=images(), right=masks)
    assert bytes_of(opened(path, image_column="right")) == [png_mask()] * 3
    assert "from the column left, not from right (--image-column)" in opened(path).notes[0]
    for column in ("up", "n"):
        with pytest.raises(UserError, match=rf"--image-column {column}: no column of image bytes; the columns are"):
            opened(write(tmp_path / "n.parquet", left=images(), n=[1, 2, 3]), image_column=column)
    for columns in ({"url": ["https://x/1.jpg"]}, {"image": [{"path": "1.jpg"}]}, {"image": [{"bytes": "text"}]}):
        with pytest.raises(UserError, match="no image column of bytes among the columns"):
            opened(write(tmp_path / "none.parquet", **columns))


def test_files_with_other_columns_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "hf" / "train-0.parquet", image=images(), label=[0, 1, 0])
    for columns, message in (
        (
            {"image": images()},
            r"train-0\.parquet has a column label of numbers and train-1\.parquet has no such column",
        ),
        ({"image": images(), "label": ["a", "b", "a"]}, "has one of type string.*--labels none"),
        ({"picture": images(), "label": [0, 1, 0]}, "has a column image of images and train-1.parquet has no such"),
    ):
        write(tmp_path / "hf" / "train-1.parquet", **columns)
        with pytest.raises(UserError, match=message):
            opened(tmp_path / "hf")
    write(tmp_path / "hf" / "train-1.parquet", image=images())
    assert len(opened(tmp_path / "hf", labels="none").listing) == 6
    for number, names in enumerate((["a", "b"], ["b", "a"])):
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        write(tmp_path / "hf" / f"train-{number}.parquet", features, image=images(), label=[0, 1, 0])
    with pytest.raises(UserError, match="name other classes in column label"):
        opened(tmp_path / "hf")
    write(first, image=images(), label=pa.array([0, 1, 0], pa.int8()))
    write(tmp_path / "hf" / "train-1.parquet", image=images(), label=[2, 1, 0])  # int64
    assert labels_of(tmp_path / "hf") == (("0", "1", "2"), [0, 1, 0, 2, 1, 0])


def test_odd_names_and_rows(tmp_path: Path) -> None:
    paths = ["../../etc/x.jpg", "a\0b.png", "", None, "@eaDir/y.jpg", "c\x1b[31m.JPEG"]
    rows = [{"bytes": IMAGES[0], "path": path} for path in paths]
    rows += [{"bytes": None, "path": "only-a-path.jpg"}, None, {"bytes": b"", "path": "empty.jpg"}]
    source = opened(write(tmp_path / "x.parquet", image=rows))
    assert [source.listing.name(n).partition("_")[2] for n in range(len(source.listing))] == [
        *("x.jpg", "a\0b.png", "image.jpg", "image.jpg", "y.jpg", "c\x1b[31m.JPEG", "empty.jpg"),
    ]
    assert [entry.reason for entry in source.listing.rejected] == ["no bytes in the parquet file"] * 2
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    write(tmp_path / "paths.parquet", image=pa.array([{"bytes": None, "path": "x.jpg"}] * 3, struct))
    with pytest.raises(UserError, match=r"no images in .*3 other entries"):
        opened(tmp_path / "paths.parquet")
    with pytest.raises(UserError, match="no images in"):
        opened(write(tmp_path / "empty.parquet", image=pa.array([], pa.binary())))


def test_a_parquet_file_of_any_name_and_folders_of_images_with_one(tmp_path: Path) -> None:
    plain = write(tmp_path / "x.parquet", image=images()).rename(tmp_path / "download")
    assert len(opened(plain).listing) == 3
    (tmp_path / "root" / "cats" / "deep").mkdir(parents=True)
    (tmp_path / "root" / "cats" / "1.jpg").write_bytes(IMAGES[0])
    write(tmp_path / "root" / "cats" / "deep" / "metadata.parquet", image=images())
    assert len(opened(tmp_path / "root").listing) == 1


def test_the_copy_is_made_again_for_other_columns_only(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", image=images(), other=IMAGES[::-1], label=[0, 1, 0])
    assert bytes_of(opened(path)) == IMAGES
    container = tmp_path / "spool" / "images.bin"
    before = container.stat().st_ino
    assert labels_of(path) == (("0", "1"), [0, 1, 0])
    assert container.stat().st_ino == before
    assert bytes_of(opened(path, image_column="other")) == IMAGES[::-1]
    assert labels_of(path, labels="none") == ((), [-1] * 3)


@pytest.mark.parametrize("seed", range(80))
def test_damaged_files_are_users_errors(seed: int, tmp_path: Path) -> None:
    rng, file = random.Random(seed), io.BytesIO()
    pq.write_table(pa.table({"image": images(20), "label": ["a", "b"] * 10}), file, row_group_size=5)
    content = bytearray(file.getvalue())
    footer = len(content) - int.from_bytes(content[-8:-4], "little") - 8
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(footer if rng.random() < 0.7 else 4, len(content))
        content[at : at + 2] = rng.randbytes(2)
    (tmp_path / "x.parquet").write_bytes(content[: rng.choice([len(content)] * 4 + [len(content) // 2])])
    try:
        source = opened(tmp_path / "x.parquet")
    except UserError:
        return
    assert len(bytes_of(source)) <= 20
