"""Tars made by others become a dataset where they lie."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import shutil
import tarfile
from pathlib import Path

import pytest

from pipeline.checking.check_dataset import inspect_dataset
from pipeline.checking.check_shard import CheckOptions
from pipeline.checking.repair import repair_dataset
from pipeline.common.errors import UserError
from pipeline.dataset.dataset import ShardSet
from pipeline.sharding.make_dataset import Summary, make_dataset
from pipeline.sharding.options import ShardingOptions
from tests.helpers.photos import image_bytes, write_foreign_tars


def index(pattern: str, out: Path, **options: object) -> Summary:
    in_process = "workers" not in options
    return make_dataset(f"wds:{pattern}", out, ShardingOptions(**options), quiet=True, in_process=in_process)  # type: ignore[arg-type]


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    return write_foreign_tars(tmp_path / "tars")


def test_samples_labels_and_refusals(tars: Path, tmp_path: Path) -> None:
    before = {p: p.read_bytes() for p in tars.iterdir()}
    summary = index(str(tars / "set-{000000..000001}.tar"), tmp_path / "out", workers=2)
    assert (summary.shards, summary.images, summary.rejected) == (2, 11, {"truncated": 1})
    dataset = ShardSet.open(tmp_path / "out")
    kept = [i for i in range(12) if i != 7]
    assert [dataset.key(i) for i in range(11)] == [f"deep/er/{i:03d}" for i in kept]
    assert dataset.labels(range(11)).tolist() == [i % 3 for i in kept]
    assert (dataset.classes, dataset.has_labels) == (("0", "1", "2"), True)
    assert all(dataset.read(n) == image_bytes(i) for n, i in enumerate(kept))
    assert before == {p: p.read_bytes() for p in tars.iterdir()}
    rejected = json.loads((tmp_path / "out" / "rejected.jsonl").read_text())
    assert rejected == {"name": "set-000001.tar/deep/er/007", "reason": "truncated"}


def test_the_index_is_dalis(tars: Path, tmp_path: Path) -> None:
    wds2idx = pytest.importorskip("wds2idx")
    index(str(tars / "set-000000.tar"), tmp_path / "out")
    with wds2idx.IndexCreator(str(tars / "set-000000.tar"), str(tmp_path / "theirs"), verbose=False) as creator:
        creator.create_index()
    assert (tmp_path / "theirs").read_text() == (tmp_path / "out" / "index-000000.idx").read_text()


def test_a_dataset_beside_its_tars_can_be_moved_and_removed(tars: Path, tmp_path: Path) -> None:
    (tars / "set-000000.tar").rename(tars / "shard-000000.tar")  # a name that we would use ourselves
    index(str(tars / "*.tar"), tars)
    moved = tars.rename(tmp_path / "moved")
    dataset = ShardSet.open(moved)
    assert [s.name for s in dataset.shards] == ["set-000001.tar", "shard-000000.tar"]
    assert dataset.read(0) == image_bytes(6)
    index(str(moved / "*.tar"), moved, overwrite=True, verify="header")
    assert sorted(p.name for p in moved.glob("*.tar")) == ["set-000001.tar", "shard-000000.tar"]
    assert len(ShardSet.open(moved)) == 12


def test_an_overwritten_index_leaves_tars_outside_alone(tars: Path, tmp_path: Path) -> None:
    index(str(tars / "*.tar"), tmp_path / "out")
    make_dataset("synthetic:5", tmp_path / "out", ShardingOptions(overwrite=True), quiet=True, in_process=True)
    assert len(list(tars.glob("*.tar"))) == 2
    assert not list((tmp_path / "out").glob("index-*"))


def test_it_goes_on_after_an_interruption(tars: Path, tmp_path: Path) -> None:
    index(str(tars / "*.tar"), tmp_path / "whole")
    index(str(tars / "*.tar"), tmp_path / "out", part="1/2")
    index(str(tars / "*.tar"), tmp_path / "out")
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def strange_tar(path: Path) -> Path:
    with tarfile.open(path, "w") as tar:

        def add(name: str, data: bytes, kind: bytes = tarfile.REGTYPE) -> None:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data), kind, "/etc/passwd"
            tar.addfile(info, io.BytesIO(data))

        add("good.png", image_bytes(1, encoding="PNG"))
        add(".hidden.jpg", image_bytes(1))
        add("link.jpg", b"", tarfile.SYMTYPE)
        add("../../evil.jpg", image_bytes(2))
        add("caption.txt", b"no image")
        add("word.jpg", image_bytes(3))
        add("word.cls", b"seven")
        add("long.jpg", image_bytes(3))
        add("long.cls", b"7" * 100_000)
    return path


def test_strange_members(tmp_path: Path) -> None:
    summary = index(str(strange_tar(tmp_path / "strange.tar")), tmp_path / "out")
    assert summary.rejected == {
        "a link inside an archive": 1,
        "its .cls file is larger than 256 bytes, so it is no class": 1,
        "no image among its members": 1,
    }
    dataset = ShardSet.open(tmp_path / "out")
    assert (
        [dataset.key(i) for i in range(3)],
        dataset.has_labels,
        dataset.classes,
        dataset.labels(range(3)).tolist(),
    ) == (
        ["good", "../../evil", "word"],
        False,
        ("seven",),
        [-1, -1, 0],
    )
    assert not (tmp_path.parent / "evil.jpg").exists()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def indexed(path: Path, out: Path, **options: object) -> tuple[ShardSet, list[dict[str, str]]]:
    """The dataset made of one tar, checked as check_shards does, and rejected.jsonl."""
    index(str(path), out, **options)
    inspection = inspect_dataset(out, CheckOptions(), quiet=True)
    assert not inspection.damage, inspection.damage
    lines = (out / "rejected.jsonl").read_text().splitlines()
    return ShardSet.open(out), [json.loads(line) for line in lines]


JPEG, PNG = image_bytes(1), image_bytes(2, mode="L", encoding="PNG")
SEVERAL = {
    "a depth map before the image": (("depth.png", "jpg"), {}, "jpg"),
    "a mask as plain as the image": (("png", "jpg"), {}, "jpg"),
    "left and right": (("left.jpg", "right.jpg"), {}, "left.jpg"),
    "right is asked for": (("left.jpg", "right.jpg"), {"wds_image_ext": "right.jpg"}, "right.jpg"),
    "a list is asked for": (("left.jpg", "right.jpg"), {"wds_image_ext": "up.jpg; .RIGHT.jpg"}, "right.jpg"),
    "a mask, named so": (("seg.png", "rgb.png"), {}, "rgb.png"),
    "thumbnails": (("thumb.jpg", "orig.jpg"), {}, "orig.jpg"),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_of_several_images_one_is_taken_and_named(kind: str, tmp_path: Path) -> None:
    endings, options, taken = SEVERAL[kind]
    data = {
        ending: image_bytes(n, encoding="PNG" if ending.endswith("png") else "JPEG") for n, ending in enumerate(endings)
    }
    tar = write_tar(tmp_path / "in.tar", [(f"s{n}.{ending}", data[ending]) for n in range(2) for ending in endings])
    dataset, rejected = indexed(tar, tmp_path / "out", **options)
    assert [dataset.read(n) for n in range(2)] == [data[taken]] * 2
    other = next(ending for ending in endings if ending != taken)
    assert [entry["name"] for entry in rejected] == [f"in.tar/s{n}.{other}" for n in range(2)]
    assert f"{taken} was taken, not {other} (--wds-image-ext chooses" in rejected[0]["reason"]


def test_dots_in_keys_are_webdatasets_and_told(tmp_path: Path) -> None:
    members = [
        (f"img.v{n}.0.{end}", image_bytes(n) if end == "jpg" else b"%d" % n)
        for n in (1, 2, 3)
        for end in ("jpg", "cls")
    ]
    tar = write_tar(tmp_path / "in.tar", members)
    dataset, rejected = indexed(tar, tmp_path / "out")
    assert (len(dataset), dataset.read(0), dataset.labels([0]).tolist()) == (1, image_bytes(1), [1])
    assert [entry["name"] for entry in rejected] == ["in.tar/img.v2.0.jpg", "in.tar/img.v3.0.jpg"]
    assert "a key ends at the first dot" in rejected[0]["reason"]
    dataset, _ = indexed(tar, tmp_path / "chosen", wds_image_ext="v3.0.jpg")
    assert (dataset.read(0), dataset.labels([0]).tolist()) == (image_bytes(3), [3])


def test_members_of_a_sample_that_lie_apart_are_found(tmp_path: Path) -> None:
    members = [(f"{n}.jpg", image_bytes(n)) for n in range(3)] + [(f"{n}.cls", b"%d" % n) for n in (2, 0, 1)]
    dataset, rejected = indexed(write_tar(tmp_path / "in.tar", members), tmp_path / "out")
    assert ([dataset.read(n) for n in range(3)], dataset.labels(range(3)).tolist()) == (
        [image_bytes(n) for n in range(3)],
        [0, 1, 2],
    )
    assert rejected == []


@pytest.mark.parametrize("names", [("a.jpg", "a.jpg"), ("a.jpg", "b.jpg", "a.jpg"), ("a.jpg", "a.cls", "a.cls")])
def test_a_member_twice_is_an_error(names: tuple[str, ...], tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "in.tar", [(name, JPEG) for name in names])
    with pytest.raises(UserError, match=r"in\.tar holds the member 'a\.(jpg|cls)' twice"):
        index(str(tar), tmp_path / "out")


def test_words_are_classes_over_all_tars(tmp_path: Path, photo_dataset_path: Path) -> None:
    for number, words in enumerate((("newt", "dog"), ("cat", None, "dog\n"))):
        members = [(f"{n}.jpg", image_bytes(n)) for n in range(len(words))]
        members += [(f"{n}.cls", word.encode()) for n, word in enumerate(words) if word is not None]
        write_tar(tmp_path / "tars" / f"{number}.tar", members)
    summary = index(str(tmp_path / "tars" / "*.tar"), tmp_path / "out", workers=2)
    dataset = ShardSet.open(tmp_path / "out")
    assert (dataset.classes, dataset.labels(range(5)).tolist()) == (("cat", "dog", "newt"), [2, 1, 0, -1, 1])
    assert (summary.labels_from, summary.unlabelled) == ("their .cls files", 1)
    assert not inspect_dataset(tmp_path / "out", CheckOptions(), quiet=True).damage
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "samples.npy").unlink()
    repair_dataset(tmp_path / "out", 1, quiet=True, in_process=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    index(str(tmp_path / "tars" / "*.tar"), tmp_path / "adopted", classes_from=photo_dataset_path)
    adopted = ShardSet.open(tmp_path / "adopted")
    assert (adopted.classes, adopted.labels(range(5)).tolist()) == (("cat", "dog", "fish", "newt"), [3, 1, 0, -1, 1])
    write_tar(tmp_path / "tars" / "2.tar", [("x.jpg", JPEG), ("x.cls", b"yak")])
    with pytest.raises(UserError, match="class 'yak' is not one of the 4 known classes"):
        index(str(tmp_path / "tars" / "*.tar"), tmp_path / "unknown", classes_from=photo_dataset_path)


@pytest.mark.parametrize("apart", [False, True])
def test_words_and_numbers_do_not_mix(apart: bool, tmp_path: Path) -> None:
    members = [("a.jpg", JPEG), ("a.cls", b"seven"), ("b.jpg", JPEG), ("b.cls", b"3")]
    write_tar(tmp_path / "tars" / "0.tar", members[:2] if apart else members)
    write_tar(tmp_path / "tars" / "1.tar", members[2:])
    with pytest.raises(
        UserError, match=r"a word in some samples, such as 'seven', and a number in others, such as 3 of"
    ):
        index(str(tmp_path / "tars" / "*.tar"), tmp_path / "out")


def test_labels_in_json(tmp_path: Path) -> None:
    values = ['{"y": 2, "meta": {"kind": "b"}}', '{"y": 0.0}', '{"y": null, "meta": {"kind": "a"}}', '{"x": 1}']
    bad = [
        '{"y": [1]}',
        '{"y": 0.5}',
        '{"y": -2}',
        "{",
        "[" * 100_000,
        '{"y": ""}',
        '{"y": Infinity}',
        '{"y": 4294967296}',
    ]
    members = [
        member
        for n, text in enumerate(values + bad)
        for member in ((f"{n:02}.json", text.encode()), (f"{n:02}.jpg", JPEG))
    ]
    tar = write_tar(tmp_path / "in.tar", members)
    dataset, rejected = indexed(tar, tmp_path / "out", wds_label_key="y")
    assert (dataset.labels(range(4)).tolist(), dataset.classes) == ([2, 0, -1, -1], ("0", "1", "2"))
    assert [entry["name"] for entry in rejected] == [f"in.tar/{n:02}" for n in range(4, 12)]
    assert all("its .json file" in entry["reason"] for entry in rejected)
    words, _ = indexed(tar, tmp_path / "words", wds_label_key="meta.kind", wds_image_ext="jpg")
    assert (words.labels(range(4)).tolist(), words.classes) == ([1, -1, 0, -1], ("a", "b"))


def test_labels_that_are_no_classes_are_named(tmp_path: Path) -> None:
    texts = (b"", b"a\nb", b"\xff\xfe", b"1" * 300, b"-2", b"0.5", b"99999999999999999999")
    members = [m for n, text in enumerate(texts) for m in ((f"{n}.jpg", JPEG), (f"{n}.cls", text))]
    members += [("good.jpg", JPEG), ("good.cls", b" 1.0\n"), ("none.jpg", JPEG), ("none.cls", b"-1")]
    dataset, rejected = indexed(write_tar(tmp_path / "in.tar", members), tmp_path / "out")
    assert dataset.labels(range(2)).tolist() == [1, -1]
    assert len(rejected) == len(texts)
    assert all("its .cls file" in entry["reason"] for entry in rejected)


def test_a_label_far_above_the_samples_is_refused_with_its_sample(tmp_path: Path) -> None:
    for label in (b"2147483647", b"50000000"):
        tar = write_tar(tmp_path / "in.tar", [("a.jpg", JPEG), ("a.cls", b"1"), ("b.jpg", JPEG), ("b.cls", label)])
        with pytest.raises(UserError, match=r"sample 1 of .*in\.tar.* would make [\d,]+ classes for 2 images"):
            index(str(tar), tmp_path / "out", overwrite=True)


def test_compressed_and_concatenated_tars(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [("a.jpg", JPEG)])
    for module, name in ((gzip, "gzip"), (bz2, "bzip2"), (lzma, "xz")):
        (tmp_path / "packed.tar").write_bytes(module.compress(tar.read_bytes()))  # type: ignore[attr-defined]
        with pytest.raises(UserError, match=rf"is compressed with {name}"):
            index(str(tmp_path / "packed.tar"), tmp_path / "out", overwrite=True)
    other = write_tar(tmp_path / "b.tar", [("b.jpg", image_bytes(2))])
    (tmp_path / "both.tar").write_bytes(tar.read_bytes() + other.read_bytes())
    dataset, _ = indexed(tmp_path / "both.tar", tmp_path / "both")
    assert [dataset.read(n) for n in range(2)] == [JPEG, image_bytes(2)]


def test_options_of_tars_are_for_tars(tmp_path: Path, photo_folder: Path) -> None:
    for options in ({"wds_image_ext": "jpg"}, {"wds_label_key": "y"}):
        with pytest.raises(UserError, match=r"is for SOURCE wds:PATTERN"):
            make_dataset(str(photo_folder), tmp_path / "out", ShardingOptions(**options), quiet=True, in_process=True)  # type: ignore[arg-type]


def test_labels_can_be_left_out_or_named(tars: Path, tmp_path: Path, photo_dataset_path: Path) -> None:
    index(str(tars / "*.tar"), tmp_path / "none", labels="none")
    assert not ShardSet.open(tmp_path / "none").has_labels
    index(str(tars / "*.tar"), tmp_path / "named", classes_from=photo_dataset_path)
    assert ShardSet.open(tmp_path / "named").classes == ("cat", "dog", "fish", "newt")


def test_mistakes(tars: Path, tmp_path: Path) -> None:
    for pattern, message in (
        (f"{tars}/none-*.tar", "no such tar"),
        (f"{tars}/set-{{000000..000003}}.tar", "set-000002.tar is missing"),
        (f"{tars}/set-{{000000..000003.tar", r"braces|missing"),
    ):
        with pytest.raises(UserError, match=message):
            index(pattern, tmp_path / "out")
    for options in (
        {"limit": 3},
        {"shorter_side": 64},
        {"subtree": "x"},
        {"labels": "folders"},
        {"label_column": "x"},
        {"image_column": "x"},
    ):
        with pytest.raises(UserError, match=r"does not go with wds:"):
            index(str(tars / "*.tar"), tmp_path / "out", **options)
    cut = Path(shutil.copy(tars / "set-000001.tar", tmp_path / "cut.tar"))
    cut.write_bytes(cut.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"cut.tar is damaged or cut off"):
        index(str(cut), tmp_path / "cut-out")
    assert not (tmp_path / "cut-out" / "dataset.json").exists()
