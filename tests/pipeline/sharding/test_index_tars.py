"""Tars made by others become a dataset where they lie."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest

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
        "its .cls file is not a class number": 2,
        "no image among its members": 1,
    }
    dataset = ShardSet.open(tmp_path / "out")
    assert ([dataset.key(i) for i in range(2)], dataset.has_labels, dataset.classes) == (
        ["good", "../../evil"],
        False,
        (),
    )
    assert not (tmp_path.parent / "evil.jpg").exists()


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
    for options in ({"limit": 3}, {"shorter_side": 64}, {"subtree": "x"}, {"labels": "folders"}):
        with pytest.raises(UserError, match=r"does not go with wds:"):
            index(str(tars / "*.tar"), tmp_path / "out", **options)
    cut = Path(shutil.copy(tars / "set-000001.tar", tmp_path / "cut.tar"))
    cut.write_bytes(cut.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"cut.tar is damaged or cut off"):
        index(str(cut), tmp_path / "cut-out")
    assert not (tmp_path / "cut-out" / "dataset.json").exists()
