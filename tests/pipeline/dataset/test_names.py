"""The path of each sample in its source: kept, mapped, checked, repaired; datasets without it stay readable."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.checking.check_dataset import inspect_dataset
from pipeline.checking.check_shard import CheckOptions
from pipeline.checking.repair import repair_dataset
from pipeline.common.errors import UserError
from pipeline.dataset import names as names_module
from pipeline.dataset.dataset import ShardSet
from pipeline.dataset.format import PARTIAL_DIR
from pipeline.dataset.names import NAME_STARTS_FILE, NAMES_FILE, encode_names, join_names, open_names, read_names
from pipeline.dataset.out_folder import LocalOut
from pipeline.sharding.make_dataset import make_dataset
from pipeline.sharding.options import ShardingOptions
from tests.helpers.photos import image_bytes, write_foreign_tars

NONE = CheckOptions(decode="none")


@pytest.fixture
def copy(photo_dataset_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(photo_dataset_path, tmp_path / "copy"))


def damage(path: Path) -> list[str]:
    return [str(one) for one in inspect_dataset(path, NONE, quiet=True).damage]


def test_names_lead_back_to_the_source(photo_folder: Path, photo_dataset: ShardSet) -> None:
    assert photo_dataset.names is not None
    assert len(photo_dataset.names) == len(photo_dataset)
    for sample_id, name in enumerate(photo_dataset.names):
        assert (photo_folder / name).read_bytes() == photo_dataset.read(sample_id)
    assert photo_dataset.names[-1] == photo_dataset.names[47]
    assert photo_dataset.names[45:99] == [photo_dataset.names[i] for i in (45, 46, 47)]
    with pytest.raises(IndexError):
        photo_dataset.names[48]


def test_names_of_any_bytes_are_kept(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    odd = [b"a b.jpg", "日本.jpg".encode(), b"not utf-8 \xff\xfe.jpg", b"new\nline.jpg"]
    for number, name in enumerate(odd):
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path / "in"), name))).write_bytes(image_bytes(number))
    make_dataset(str(tmp_path / "in"), tmp_path / "out", ShardingOptions(), quiet=True, in_process=True)
    dataset = ShardSet.open(tmp_path / "out")
    assert dataset.names is not None
    assert sorted(map(os.fsencode, dataset.names)) == sorted(odd)
    assert damage(tmp_path / "out") == []


def test_refused_images_have_no_name(tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number}.jpg").write_bytes(image_bytes(number)[: 50 if number % 2 else None])
    make_dataset(
        str(tmp_path / "in"), tmp_path / "out", ShardingOptions(samples_per_shard=2), quiet=True, in_process=True
    )
    dataset = ShardSet.open(tmp_path / "out")
    assert dataset.names is not None
    assert [dataset.key(i).partition("_")[2] for i in range(5)] == [name[0] for name in dataset.names]


def test_indexed_tars_name_their_members(tmp_path: Path) -> None:
    folder = write_foreign_tars(tmp_path / "tars")
    make_dataset(f"wds:{folder}/*.tar", tmp_path / "out", ShardingOptions(), quiet=True, in_process=True)
    dataset = ShardSet.open(tmp_path / "out")
    assert dataset.names is not None
    for sample_id, name in enumerate(dataset.names):
        tar, _, member = name.partition("/")
        with tarfile.open(folder / tar) as archive:
            content = archive.extractfile(member)
            assert content is not None
            assert content.read() == dataset.read(sample_id)
    names = list(dataset.names)
    for name in (NAMES_FILE, NAME_STARTS_FILE):
        (tmp_path / "out" / name).unlink()
    assert any("names" in one for one in damage(tmp_path / "out"))
    assert repair_dataset(tmp_path / "out", 1, quiet=True, in_process=True).lost == ()
    assert list(ShardSet.open(tmp_path / "out").names or []) == names


def test_a_dataset_of_an_earlier_version_has_none(copy: Path) -> None:
    for name in (NAMES_FILE, NAME_STARTS_FILE):
        (copy / name).unlink()
    info = json.loads((copy / "dataset.json").read_text())
    for key in ("names", "reencoded", "compared"):
        del info[key]
    for key in ("sixteen_bit", "sixteen_bit_window", "reencode"):
        del info["recipe"][key]
    (copy / "dataset.json").write_text(json.dumps(info))
    dataset = ShardSet.open(copy)
    assert dataset.names is None
    assert len(dataset.read(47)) > 0
    assert damage(copy) == []
    (copy / "samples.npy").unlink()
    assert repair_dataset(copy, 1, quiet=True, in_process=True).lost == ()
    assert ShardSet.open(copy).names is None


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def swap(file: Path) -> None:
    """Exchange the names of two samples; the file keeps its length."""
    names = list(read_names(file))
    names[3], names[4] = names[4], names[3]
    file.write_bytes(encode_names(names))


DAMAGE = {
    "starts gone": (lambda d: (d / NAME_STARTS_FILE).unlink(), True),
    "starts cut": (lambda d: cut(d / NAME_STARTS_FILE), True),
    "starts of another dataset": (lambda d: np.save(d / NAME_STARTS_FILE, np.arange(7)), True),
    "starts empty": (lambda d: (d / NAME_STARTS_FILE).write_bytes(b""), True),
    "starts shifted": (
        lambda d: np.save(d / NAME_STARTS_FILE, np.sort(np.load(d / NAME_STARTS_FILE) // 2 * 2)), True),
    "names gone": (lambda d: (d / NAMES_FILE).unlink(), False),
    "names cut": (lambda d: cut(d / NAMES_FILE), False),
    "names exchanged": (lambda d: swap(d / NAMES_FILE), False),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_mended_or_told(kind: str, copy: Path, photo_dataset: ShardSet) -> None:
    do, mended = DAMAGE[kind]
    do(copy)
    assert any("names" in one for one in damage(copy))
    done = repair_dataset(copy, 1, quiet=True, in_process=True)
    assert damage(copy) == []
    dataset = ShardSet.open(copy)
    if mended:
        assert done.lost == ()
        assert list(dataset.names or []) == list(photo_dataset.names or [])
    else:
        assert done.lost == ("the paths of the samples in the source (dataset.names)",)
        assert dataset.names is None
        assert not (copy / NAMES_FILE).exists()


def test_names_are_kept_without_a_record_only_if_they_fit_the_keys(copy: Path, photo_dataset: ShardSet) -> None:
    (copy / "dataset.json").unlink()
    assert "names.bin" not in repair_dataset(copy, 1, quiet=True, in_process=True).rewritten
    assert list(ShardSet.open(copy).names or []) == list(photo_dataset.names or [])
    (copy / "dataset.json").unlink()
    swap(copy / NAMES_FILE)
    assert "paths" in repair_dataset(copy, 1, quiet=True, in_process=True).lost[-1]
    assert ShardSet.open(copy).names is None


def test_missing_names_are_a_users_error_only_when_they_are_asked_for(copy: Path) -> None:
    (copy / NAMES_FILE).unlink()
    dataset = ShardSet.open(copy)
    assert len(dataset.read(0)) > 0
    with pytest.raises(UserError, match=r"names\.bin is missing.*--repair"):
        _ = dataset.names


@given(
    names=st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=9), max_size=30)
)
def test_any_names_come_back(names: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("names")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(names_module, "_PIECE", 7)  # names and their ends fall on any part of a piece
        parts = (encode_names(names[i : i + 4]) for i in range(0, len(names), 4))
        (folder / PARTIAL_DIR).mkdir()
        out = LocalOut(folder)
        with out.writer(NAMES_FILE) as text, out.writer(NAME_STARTS_FILE) as starts:
            recorded = join_names(text, starts, parts, len(names))
        assert list(read_names(folder / NAMES_FILE)) == names
    opened = open_names(folder, {"names": recorded, "num_samples": len(names)})
    assert opened is not None
    assert list(opened) == names
