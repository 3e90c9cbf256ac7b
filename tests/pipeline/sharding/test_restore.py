"""Lost shards of a complete dataset are written again by the same command, or stay lost with a reason."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.checking.repair import repair_dataset
from pipeline.common.errors import UserError
from pipeline.dataset.dataset import ShardSet
from pipeline.sharding.make_dataset import Summary, make_dataset
from pipeline.sharding.options import ShardingOptions
from tests.helpers.photos import image_bytes

SHARD, INDEX = "shard-000002.tar", "shard-000002.idx"


def make(source: Path, out: Path, **options: Any) -> Summary:
    return make_dataset(str(source), out, ShardingOptions(samples_per_shard=10, **options), quiet=True, in_process=True)


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def photos(photo_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(photo_folder, tmp_path / "photos"))


@pytest.fixture
def copy(photo_dataset_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(photo_dataset_path, tmp_path / "copy"))


LOSSES = {
    "a tar": lambda d: (d / SHARD).unlink(),
    "a tar and its index": lambda d: [(d / name).unlink() for name in (SHARD, INDEX)],
    "an index": lambda d: (d / INDEX).unlink(),
    "a tar's end": lambda d: os.truncate(d / SHARD, 5000),
    "three tars": lambda d: [(d / f"shard-00000{n}.tar").unlink() for n in (0, 3, 4)],
}


@pytest.mark.parametrize("kind", LOSSES)
def test_what_is_lost_is_written_again(kind: str, photos: Path, copy: Path) -> None:
    whole = tree(copy)
    LOSSES[kind](copy)
    summary = make(photos, copy)
    assert summary.restored == (3 if kind == "three tars" else 1)
    assert tree(copy) == whole
    assert make(photos, copy).restored == 0


def test_after_an_interruption_it_goes_on(photos: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tree(copy)
    LOSSES["three tars"](copy)
    original, built = __import__("pipeline.sharding.write_shard", fromlist=["WriteJob"]).WriteJob.build, []

    def build(job: Any, number: int, tick: Any) -> None:
        if built:
            os._exit(9)
        built.append(number)
        original(job, number, tick)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr("pipeline.sharding.write_shard.WriteJob.build", build)
        make(photos, copy)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert make(photos, copy).images == 48
    assert tree(copy) == whole


def test_a_changed_source_restores_nothing(photos: Path, copy: Path) -> None:
    (copy / SHARD).unlink()
    before = {name: data for name, data in tree(copy).items()}
    (photos / "cat" / "new.jpg").write_bytes(image_bytes(5))
    with pytest.raises(UserError, match=r"has lost 1 of its shards.*SOURCE has changed"):
        make(photos, copy)
    assert {n: d for n, d in tree(copy).items() if not n.startswith(".partial")} == before


def test_other_bytes_are_not_taken(photos: Path, copy: Path) -> None:
    os.truncate(copy / SHARD, 5000)
    before = tree(copy)
    for path in photos.rglob("*.jpg"):
        data = path.read_bytes()
        path.write_bytes(data[:-3] + b"\0" + data[-2:])  # as long as before, and decodable
    with pytest.raises(UserError, match=rf"{SHARD} came out with other bytes than recorded"):
        make(photos, copy)
    assert {n: d for n, d in tree(copy).items() if n in before and n != INDEX} == {
        n: d for n, d in before.items() if n != INDEX
    }
    with pytest.raises(UserError, match="has 5000 bytes instead of"):
        ShardSet.open(copy)


def test_other_options_are_refused_as_ever(photos: Path, copy: Path) -> None:
    (copy / SHARD).unlink()
    with pytest.raises(UserError, match="--seed was 0, now 5"):
        make(photos, copy, seed=5)


def test_a_link_in_place_of_the_working_folder_is_refused(photos: Path, copy: Path, tmp_path: Path) -> None:
    (tmp_path / "outside" / "done").mkdir(parents=True)
    (tmp_path / "outside" / "done" / "mine.txt").write_text("keep")
    (copy / ".partial").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="is a link to another folder"):
        repair_dataset(copy, 1, quiet=True, in_process=True)
    (copy / SHARD).unlink()
    with pytest.raises(UserError, match="is a link to another folder"):
        make(photos, copy)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / ".partial").symlink_to(tmp_path / "outside")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="is a link to another folder"):
            make(photos, fresh, overwrite=overwrite)
    assert tree(tmp_path / "outside") == {"done/mine.txt": b"keep"}
