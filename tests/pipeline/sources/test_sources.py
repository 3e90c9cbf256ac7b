"""Every kind of source gives the same images, names and labels, and hostile ones do no harm."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.common.errors import UserError
from pipeline.dataset.dataset import ShardSet
from pipeline.sharding.make_dataset import make_dataset
from pipeline.sources.listing import Listing
from pipeline.sources.open_source import KINDS, open_source, source_title
from pipeline.sources.readers import Source
from tests.helpers.photos import CLASSES, PER_CLASS, image_bytes

COUNT = len(CLASSES) * PER_CLASS


def open_it(source: Path | str, spool: Path, **options: object) -> Source:
    spool.mkdir(exist_ok=True)
    return open_source(str(source), spool, **options)  # type: ignore[arg-type]


def contents(source: Source) -> dict[str, tuple[int, bytes]]:
    listing = source.listing
    return {listing.name(i): (int(listing.labels[i]), source.reader.read(listing, i)) for i in range(len(listing))}


def tar_of(folder: Path, path: Path, mode: str = "w", inside: str = "") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for file in sorted(folder.rglob("*"), reverse=True):  # an order of its own
            tar.add(file, f"{inside}{file.relative_to(folder)}", recursive=False)
    return path


def tar_with(path: Path, members: dict[str, bytes], change: object = None) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if change is not None:
                change(info)  # type: ignore[operator]
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def folder_contents(photo_folder: Path, tmp_path: Path) -> dict[str, tuple[int, bytes]]:
    return contents(open_it(photo_folder, tmp_path / "spool"))


def test_a_folder_is_sorted_and_labelled_by_its_class_folders(photo_folder: Path, tmp_path: Path) -> None:
    source = open_it(photo_folder, tmp_path / "spool")
    names = [source.listing.name(i) for i in range(len(source.listing))]
    assert names == sorted(names)
    assert (len(names), source.listing.classes) == (COUNT, CLASSES)
    assert all(CLASSES[label] == name.split("/")[0] for name, (label, _) in contents(source).items())


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_gives_what_its_folder_gives(
    mode: str, photo_folder: Path, folder_contents: dict[str, tuple[int, bytes]], tmp_path: Path
) -> None:
    tar = tar_of(photo_folder, tmp_path / "photos.tar", mode, inside="./set/train/")
    for subtree in ("set/train", "/set/train/", "./set/train"):
        source = open_it(tar, tmp_path / "spool", subtree=subtree)
        assert contents(source) == folder_contents
        assert source.listing.fingerprint() == open_it(photo_folder, tmp_path / "spool").listing.fingerprint()
    assert all(not file.name.endswith(".jpg") for file in tmp_path.rglob("*"))


def test_a_tar_of_class_tars_is_read_in_place(
    photo_folder: Path, folder_contents: dict[str, tuple[int, bytes]], tmp_path: Path
) -> None:
    inner = [tar_of(photo_folder / name, tmp_path / f"{name}.tar") for name in reversed(CLASSES)]
    outer = tmp_path / "ILSVRC2012_img_train.tar"
    with tarfile.open(outer, "w") as tar:
        for path in inner:
            tar.add(path, path.name)
            path.unlink()
    assert contents(open_it(outer, tmp_path / "spool")) == folder_contents


def test_a_compressed_tar_is_unpacked_once(photo_folder: Path, tmp_path: Path) -> None:
    tar = tar_of(photo_folder, tmp_path / "photos.tgz", "w:gz")
    open_it(tar, tmp_path / "spool")
    unpacked = tmp_path / "spool" / "unpacked.tar"
    before = unpacked.stat().st_ino
    open_it(tar, tmp_path / "spool")
    assert unpacked.stat().st_ino == before
    os.utime(tar, ns=(1, 1))  # another file under the old name
    open_it(tar, tmp_path / "spool")
    assert unpacked.stat().st_ino != before


@pytest.mark.parametrize("struct", [True, False])
def test_parquet_gives_the_same_images(struct: bool, photo_folder: Path, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import json

    import pyarrow.parquet as pq

    files = sorted(photo_folder.rglob("*.*"))
    labels = [CLASSES.index(f.parent.name) for f in files]
    images = [{"bytes": f.read_bytes(), "path": f.name} if struct else f.read_bytes() for f in files]
    images[3] = {"bytes": None, "path": "elsewhere.jpg"} if struct else None
    table = pa.table({"image": images, "label": labels})
    if struct:
        names = {"info": {"features": {"label": {"names": [c.upper() for c in CLASSES], "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(names)})
    (tmp_path / "hf" / "data").mkdir(parents=True)
    for i in range(2):
        rows = table.slice(i * 24, 24)
        pq.write_table(rows, tmp_path / "hf" / "data" / f"train-{i:05d}-of-00002.parquet", row_group_size=7)
    source = open_it(tmp_path / "hf", tmp_path / "spool")
    found = contents(source)
    assert [r.reason for r in source.listing.rejected] == ["no bytes in the parquet file"]
    assert list(found.values()) == [(labels[i], f.read_bytes()) for i, f in enumerate(files) if i != 3]
    assert source.listing.classes == (tuple(c.upper() for c in CLASSES) if struct else ("0", "1", "2", "3"))
    assert contents(open_it(tmp_path / "hf", tmp_path / "spool")) == found  # from the spool
    none = open_it(tmp_path / "hf", tmp_path / "spool2", labels="none")
    assert set(none.listing.labels) == {-1}


def test_parquet_with_words_as_labels_and_two_splits(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pa.table({"img": [image_bytes(i) for i in range(3)], "label": ["zebra", "ape", "zebra"]})
    for split in ("train", "test"):
        pq.write_table(table, tmp_path / f"{split}-0.parquet")
    with pytest.raises(UserError, match="test, train: choose"):
        open_it(tmp_path, tmp_path / "spool")
    source = open_it(tmp_path, tmp_path / "spool", subtree="test")
    assert (source.listing.classes, source.listing.labels.tolist()) == (("ape", "zebra"), [1, 0, 1])
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(UserError, match="no image column"):
        open_it(tmp_path / "text.parquet", tmp_path / "spool")


def test_synthetic_images(tmp_path: Path) -> None:
    source = open_it("synthetic:20", tmp_path / "spool", seed=3)
    again = contents(open_it("synthetic:20", tmp_path / "spool", seed=3))
    assert contents(source) == again
    assert contents(open_it("synthetic:20", tmp_path / "spool", seed=4)) != again
    assert source.listing.labels.max() < len(source.listing.classes)
    assert pickle.loads(pickle.dumps(source.reader)).read(source.listing, 5) == again["synthetic-000000005.jpg"][1]
    for wrong in ("synthetic:", "synthetic:0", "synthetic:many"):
        with pytest.raises(UserError, match="at least 1"):
            open_it(wrong, tmp_path / "spool")


def test_hidden_and_foreign_files_and_links(photo_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "a" / "deep").mkdir(parents=True)
    (root / "b").mkdir()
    for place in ("a/1.jpg", "a/deep/2.JPEG", "b/3.jpg", "b/.hidden.jpg", "b/Thumbs.db", "b/noextension"):
        (root / place).write_bytes(image_bytes(1))
    (root / "a" / "loop").symlink_to(root)
    (root / "b" / "broken.jpg").symlink_to(root / "nowhere")
    (root / "b" / "linked.jpg").symlink_to(root / "a" / "1.jpg")
    os.mkfifo(root / "b" / "pipe.jpg")
    listing = open_it(root, tmp_path / "spool").listing
    assert [listing.name(i) for i in range(len(listing))] == ["a/1.jpg", "a/deep/2.JPEG", "b/3.jpg", "b/linked.jpg"]
    assert listing.labels.tolist() == [0, 0, 1, 1]
    assert {r.name: r.reason for r in listing.rejected} == {
        "a/loop": "a link to a folder above it",
        "b/Thumbs.db": "not an image file",
        "b/noextension": "not an image file",
        "b/broken.jpg": "a broken link",
        "b/pipe.jpg": "neither a file nor a folder",
    }


def test_members_of_a_hostile_tar_never_become_paths(tmp_path: Path) -> None:
    data = image_bytes(1)
    tar = tar_with(
        tmp_path / "evil.tar", {"/etc/a.jpg": data, "../../b.jpg": data, "x/../c.jpg": data, "x/._d.jpg": data}
    )
    with tarfile.open(tar, "a") as archive:
        for kind, name in ((tarfile.SYMTYPE, "x/s.jpg"), (tarfile.LNKTYPE, "x/h.jpg"), (tarfile.CHRTYPE, "x/c0.jpg")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    source = open_it(tar, tmp_path / "spool", labels="none")
    assert set(contents(source)) == {"b.jpg", "etc/a.jpg", "x/c.jpg"}
    assert all(entry == (-1, data) for entry in contents(source).values())
    reasons = {r.name: r.reason for r in source.listing.rejected}
    assert set(reasons) == {"x/s.jpg", "x/h.jpg", "x/c0.jpg"}
    assert reasons["x/s.jpg"] == "a link inside an archive"


def test_a_later_member_replaces_an_earlier_one_of_its_name(tmp_path: Path) -> None:
    tar = tar_with(tmp_path / "t.tar", {"a.jpg": b"old", "b.jpg": b"b"})
    with tarfile.open(tar, "a") as archive:
        info = tarfile.TarInfo("a.jpg")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"new"))
    source = open_it(tar, tmp_path / "spool")
    assert {name: data for name, (_, data) in contents(source).items()} == {"a.jpg": b"new", "b.jpg": b"b"}
    assert source.listing.rejected[0].reason.startswith("replaced by a later")


def test_names_that_are_long_or_not_utf8(tmp_path: Path) -> None:
    names = ["n" * 300 + ".jpg", b"caf\xe9.jpg".decode("utf-8", "surrogateescape"), "日本.jpg"]
    source = open_it(tar_with(tmp_path / "t.tar", {name: b"x" for name in names}), tmp_path / "spool")
    assert set(contents(source)) == set(names)
    source.listing.save(tmp_path / "listing")
    loaded = Listing.load(tmp_path / "listing")
    assert loaded.fingerprint() == source.listing.fingerprint()
    assert {loaded.name(i) for i in range(3)} == set(names)


def damaged(kind: str, tmp_path: Path, photo_folder: Path) -> Path:
    path = tar_of(photo_folder, tmp_path / "t.tar")
    whole = path.read_bytes()
    match kind:
        case "cut inside an image":
            path.write_bytes(whole[: len(whole) // 2 + 100])
        case "garbage over a header":
            with tarfile.open(path) as tar:
                middle = tar.getmembers()[20].offset
            path.write_bytes(whole[:middle] + os.urandom(512) + whole[middle + 512 :])
        case "a cut gzip":
            tar_of(photo_folder, path, "w:gz")
            path.write_bytes(path.read_bytes()[:-2000])
        case "a rotten gzip":
            tar_of(photo_folder, path, "w:gz")
            rotten = bytearray(path.read_bytes())
            rotten[len(rotten) // 2 : len(rotten) // 2 + 50] = bytes(50)
            path.write_bytes(rotten)
        case "a cut inner tar":
            inner = whole[: len(whole) // 2 + 100]
            tar_with(path, {"cat.tar": inner, "dog.tar": whole})
    return path


@pytest.mark.parametrize(
    "kind", ["cut inside an image", "garbage over a header", "a cut gzip", "a rotten gzip", "a cut inner tar"]
)
def test_a_damaged_archive_is_an_error_not_a_smaller_set(kind: str, tmp_path: Path, photo_folder: Path) -> None:
    with pytest.raises(UserError, match="damaged"):
        open_it(damaged(kind, tmp_path, photo_folder), tmp_path / "spool")


def test_folders_of_the_system_hold_no_images(tmp_path: Path) -> None:
    names = ("$RECYCLE.BIN", "@eaDir", "lost+found", ".thumbnails", "__MACOSX", "System Volume Information", "#recycle")
    files = ["a/1.jpg", "b/2.jpg", *(f"{name}/x/3.jpg" for name in names), *(f"a/{name}/4.jpg" for name in names)]
    root = layout(tmp_path / "root", *files)
    listing = open_it(root, tmp_path / "spool").listing
    assert (listing.classes, len(listing)) == (("a", "b"), 2)
    shown = [name for name in names if not name.startswith(".")]
    reason = "in a folder of the system or of a device, not of images"
    expected = [*shown, *(f"a/{name}" for name in shown)]
    assert sorted((r.name, r.reason) for r in listing.rejected) == sorted((name, reason) for name in expected)
    listing = open_it(tar_of(root, tmp_path / "t.tar"), tmp_path / "spool").listing
    assert (listing.classes, len(listing)) == (("a", "b"), 2)
    assert {r.reason for r in listing.rejected} == {reason}


def test_what_is_no_image_is_counted_by_its_ending(tmp_path: Path) -> None:
    files = [*(f"{n}.HEIC" for n in range(12)), *(f"{n}.mp4" for n in range(3)), "README", "tar.gz.txt"]
    with pytest.raises(UserError, match=r"17 other entries \(12 \.heic, 3 \.mp4, 1 without an ending, 1 \.txt\)"):
        open_it(layout(tmp_path / "root", *files), tmp_path / "spool")
    many = layout(tmp_path / "many", *(f"x.{ending}" for ending in "abcdefghij"))
    with pytest.raises(UserError, match=r"1 \.h and 2 other kinds"):
        open_it(many, tmp_path / "spool")


def test_a_folder_of_class_tars_gives_what_the_folder_gives(
    photo_folder: Path, folder_contents: dict[str, tuple[int, bytes]], tmp_path: Path
) -> None:
    (tmp_path / "tars" / "train").mkdir(parents=True)
    for name in CLASSES:
        tar_of(photo_folder / name, tmp_path / "tars" / "train" / f"{name}.tar")
    (tmp_path / "tars" / "LICENSE").write_text("")
    source = open_it(tmp_path / "tars", tmp_path / "spool", subtree="train")
    assert (contents(source), source.labels_from) == (folder_contents, "folders")
    assert contents(Source(source.listing, pickle.loads(pickle.dumps(source.reader)))) == folder_contents
    with pytest.raises(UserError, match="--subtree train"):
        open_it(tmp_path / "tars", tmp_path / "spool")
    one = open_it(tmp_path / "tars", tmp_path / "spool", subtree="train/cat")
    assert {f"cat/{name}" for name in contents(one)} == {n for n in folder_contents if n.startswith("cat/")}
    with pytest.raises(UserError, match="is not a folder"):
        open_it(tmp_path / "tars", tmp_path / "spool", subtree="val")
    make_dataset(str(tmp_path / "tars" / "train"), tmp_path / "out", quiet=True, in_process=True)
    assert ShardSet.open(tmp_path / "out").classes == CLASSES


def test_many_class_tars_are_not_all_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.sources.readers._MOST_OPEN", 2)
    (tmp_path / "tars").mkdir()
    for number in range(5):
        tar_with(tmp_path / "tars" / f"class{number * 3}.tar", {f"{n}.jpg": bytes([number, n]) for n in range(3)})
    source = open_it(tmp_path / "tars", tmp_path / "spool")
    for name, (label, data) in contents(source).items():
        assert (source.listing.classes[label], data) == (name[:-6], bytes([int(name[5:-6]) // 3, int(name[-5])]))
    assert len(source.reader._handles) == 2  # type: ignore[attr-defined]


def test_folders_of_other_archives(tmp_path: Path, photo_dataset_path: Path) -> None:
    spool = tmp_path / "spool"
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(3):
        tar_with(shards / f"set-{number:03d}.tar", {f"{n}.jpg": b"x" for n in range(3)})
    with pytest.raises(UserError, match=r"look like WebDataset shards.*wds:"):
        open_it(shards, spool)
    assert len(open_it(shards, spool, labels="folders").listing.classes) == 3
    assert open_it(shards, spool, labels="none").listing.classes == ()
    tar_with(shards / "set-009.tar", {"a.jpg": b"x", "a.cls": b"1"})
    (shards / "set-001.tar").unlink()
    with pytest.raises(UserError, match="look like WebDataset shards"):
        open_it(shards, spool)
    single = open_it(shards / "set-009.tar", spool)
    assert "wds:" in single.notes[0]
    with pytest.raises(UserError, match="is a dataset that make_shards"):
        open_it(photo_dataset_path, spool)
    with pytest.raises(UserError, match="no images but 2 archives"):
        open_it(layout(tmp_path / "packed", "a.tar.gz", "b.zip"), spool)
    with pytest.raises(UserError, match="1 tars beside 1 images"):
        open_it(layout(tmp_path / "mixed", "a.tar", "b.jpg"), spool)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is a pipe"):
        open_it(tmp_path / "pipe", spool)


SPLITS = (
    ("Training", "Testing"),
    ("Train", "Val"),
    ("train_set", "test_set", "unlabeled"),
    ("TRAIN", "TEST", "notes"),
    ("train2017", "val2017"),
    ("seg_train", "seg_test", "seg_pred"),
    ("trainA", "trainB", "testA", "testB"),
    ("train-images", "validation images"),
    ("Unlabelled", "dev"),
)


@pytest.mark.parametrize("folders", SPLITS)
def test_folders_named_like_splits_are_asked_about(folders: tuple[str, ...], tmp_path: Path) -> None:
    root = layout(tmp_path / "root", *(f"{folder}/a/1.jpg" for folder in folders))
    with pytest.raises(UserError, match=r"look like splits, not classes: choose one with --subtree"):
        open_it(root, tmp_path / "spool")
    assert len(open_it(root, tmp_path / "spool", labels="folders").listing.classes) == len(folders)


@pytest.mark.parametrize(
    "folders", [("train", "bus", "car"), ("2019", "2020"), ("testudo", "valley"), ("setter", "devon")]
)
def test_classes_with_names_a_little_like_splits_are_classes(folders: tuple[str, ...], tmp_path: Path) -> None:
    root = layout(tmp_path / "root", *(f"{folder}/1.jpg" for folder in folders))
    assert open_it(root, tmp_path / "spool").listing.classes == tuple(sorted(folders))


def layout(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def test_when_folders_are_classes_and_when_not(tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    flat = open_it(layout(tmp_path / "flat", "1.jpg", "2.jpg"), spool).listing
    assert (flat.classes, set(flat.labels)) == ((), {-1})
    one = open_it(layout(tmp_path / "one", "photos/1.jpg"), spool).listing
    assert one.classes == ()
    assert open_it(tmp_path / "one", spool, labels="folders").listing.classes == ("photos",)
    nested = layout(tmp_path / "nested", "all/a/1.jpg", "all/b/2.jpg")
    with pytest.raises(UserError, match="--subtree all"):
        open_it(nested, spool)
    assert open_it(nested, spool, subtree="all").listing.classes == ("a", "b")
    splits = layout(tmp_path / "splits", "train/a/1.jpg", "test/a/2.jpg")
    with pytest.raises(UserError, match="look like splits"):
        open_it(splits, spool)
    assert open_it(splits, spool, labels="folders").listing.classes == ("test", "train")
    mixed = layout(tmp_path / "mixed", "cover.jpg", "a/1.jpg", "b/2.jpg")
    with pytest.raises(UserError, match="1 images outside of class folders"):
        open_it(mixed, spool)
    chosen = open_it(mixed, spool, labels="folders").listing
    assert (len(chosen), chosen.labels.tolist(), chosen.rejected[0].name) == (2, [0, 1], "cover.jpg")
    assert len(open_it(mixed, spool, labels="none").listing) == 3
    with pytest.raises(UserError, match="no sub-folders"):
        open_it(tmp_path / "flat", spool, labels="folders")


def test_a_new_kind_of_source_is_one_entry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def open_drawn(count: str, subtree: str, seed: int) -> Source:
        return open_it(f"synthetic:{count}", tmp_path / "spool", subtree=subtree, seed=seed)

    monkeypatch.setitem(KINDS, "drawn", open_drawn)
    make_dataset("drawn:5", tmp_path / "out", quiet=True, in_process=True)
    made = ShardSet.open(tmp_path / "out")
    assert (made.num_samples, made.info["source"]) == (5, "drawn:5")


def test_what_a_source_is_called(photo_folder: Path) -> None:
    """The same wherever it lies."""
    assert source_title(str(photo_folder)) == photo_folder.name
    assert source_title("synthetic:12") == "synthetic:12"
    assert source_title("wds:/data/{00..09}.tar") == "wds:{00..09}.tar"
    assert source_title("odd:name/images") == "images"


def test_sources_that_are_none(tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("hello" * 1000)
    for source, message in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "empty", "no images"),
        (layout(tmp_path / "docs", "a.txt"), "no images.*1 other entries"),
        (tmp_path / "text.txt", "neither a tar"),
    ):
        with pytest.raises(UserError, match=message):
            open_it(source, spool)
    with pytest.raises(UserError, match="is not a folder"):
        open_it(tmp_path / "docs", spool, subtree="train")


def test_a_listing_of_a_million_images_is_compact(tmp_path: Path) -> None:
    source = open_it("synthetic:100000", tmp_path / "spool")
    columns = (getattr(source.listing, c) for c in ("names", "name_starts", "offsets", "lengths", "labels"))
    assert sum(column.nbytes for column in columns) < 60 * 100_000
    assert source.listing.name(99_999) == "synthetic-000099999.jpg"
    assert np.unique(source.listing.labels).size == len(source.listing.classes)
