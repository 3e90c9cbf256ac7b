"""The check of a dataset names every kind of damage; the repair restores what the tars hold, and says what is lost."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline.checking.check_dataset
from pipeline.checking.check_dataset import Inspection, find_duplicates, inspect_dataset
from pipeline.checking.check_shard import CheckOptions, decoded_rows
from pipeline.checking.repair import repair_dataset
from pipeline.common.errors import UserError, exit_on_user_error
from pipeline.dataset.dataset import ShardSet
from pipeline.dataset.format import SAMPLE_DTYPE, file_sha256
from pipeline.sharding.make_dataset import make_dataset
from pipeline.sharding.options import ShardingOptions
from tests.helpers.photos import image_bytes, write_foreign_tars
from tools.check_shards import main

FULL = CheckOptions(decode="full", workers=2)
SHARD = "shard-000002.tar"  # rows 20 to 29


@pytest.fixture
def copy(photo_dataset_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(photo_dataset_path, tmp_path / "copy"))


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Tars of others, one of whose images is refused, and the dataset that indexes them from another folder."""
    folder = write_foreign_tars(tmp_path / "tars")
    make_dataset(f"wds:{folder}/*.tar", tmp_path / "index", ShardingOptions(), quiet=True, in_process=True)
    return tmp_path / "index"


def check(path: Path, options: CheckOptions = FULL) -> Inspection:
    return inspect_dataset(path, options, quiet=True)


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def edit_record(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    info = json.loads((folder / "dataset.json").read_text())
    change(info)
    (folder / "dataset.json").write_text(json.dumps(info))


def edit_rows(folder: Path, change: Callable[[np.ndarray], Any]) -> None:
    """Change samples.npy and its recorded hash alike, as if it had been wrong from the start."""
    rows = np.load(folder / "samples.npy")
    change(rows)
    np.save(folder / "samples.npy", rows)
    edit_record(folder, lambda info: info.update(samples_sha256=file_sha256(folder / "samples.npy")))


def overwrite(path: Path, position: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        file.write(data)


def row(folder: Path, sample_id: int) -> Any:
    return np.load(folder / "samples.npy")[sample_id]


def roll(folder: Path, field: str) -> None:
    """Shift one column by a row inside shard 2."""

    def change(rows: np.ndarray) -> None:
        rows[field][20:30] = np.roll(rows[field][20:30], 1)

    edit_rows(folder, change)


def set_field(folder: Path, field: str, value: int) -> None:
    def change(rows: np.ndarray) -> None:
        rows[field][21] = value

    edit_rows(folder, change)


def plant(folder: Path, data: bytes) -> None:
    """Overwrite the image of row 21 and make all checksums fit."""
    where = row(folder, 21)
    content = data[: int(where["length"])].ljust(int(where["length"]), b"\0")
    overwrite(folder / SHARD, int(where["offset"]), content)
    edit_record(folder, lambda info: info["shards"][2].update(sha256=file_sha256(folder / SHARD)))
    set_field(folder, "checksum", zlib.crc32(content))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str, bool]] = {
    # what is done, where the report says so and how, whether --repair mends it
    "record gone": (lambda d: (d / "dataset.json").unlink(), "dataset.json: is missing", True),
    "record garbled": (lambda d: (d / "dataset.json").write_text("{"), "dataset.json: cannot be read", True),
    "record does not add up": (
        lambda d: edit_record(d, lambda i: i.update(num_samples=7)), "dataset.json: does not add up: 7 samples", True),
    "record of another samples.npy": (
        lambda d: edit_record(d, lambda i: i.update(samples_sha256="0" * 64)), "is not the one recorded", True),
    "rows gone": (lambda d: (d / "samples.npy").unlink(), "samples.npy: is missing", True),
    "rows empty": (lambda d: (d / "samples.npy").write_bytes(b""), "samples.npy: cannot be read", True),
    "rows cut": (lambda d: os.truncate(d / "samples.npy", 1000), "samples.npy: cannot be read", True),
    "rows garbled": (lambda d: (d / "samples.npy").write_bytes(os.urandom(3000)), "samples.npy: cannot be read", True),
    "rows pickled": (
        lambda d: np.save(d / "samples.npy", np.array([{}])), "Python objects", True),
    "rows of something else": (
        lambda d: np.save(d / "samples.npy", np.zeros(48)), "samples.npy: holds something else", True),
    "rows of another dataset": (
        lambda d: np.save(d / "samples.npy", np.zeros(9, SAMPLE_DTYPE)), "number of rows: 9 instead of 48", True),
    "labels shifted": (lambda d: roll(d, "label"), f"rows of {SHARD}: have another label than the tar", True),
    "places shifted": (lambda d: roll(d, "offset"), f"rows of {SHARD}: have another length than the tar", True),
    "checksums shifted": (lambda d: roll(d, "checksum"), f"{SHARD}: has images that are not what was written", True),
    "sizes shifted": (lambda d: roll(d, "height"), f"rows of {SHARD}: have another size than the image", True),
    "a place inside an image": (lambda d: set_field(d, "offset", 700), "point where no image begins", True),
    "a place beyond the end": (lambda d: set_field(d, "offset", 2**64 - 1), "point where no image begins", True),
    "an image twice, another not": (
        lambda d: edit_rows(d, lambda r: r.__setitem__(22, r[21])), "leave out images of the tar", True),
    "a row of another shard": (lambda d: set_field(d, "shard", 99), "name another shard: row 21 says 99", True),
    "a label that is no class": (lambda d: set_field(d, "label", 77), "have a label that is no class", True),
    "too few class names": (lambda d: edit_record(d, lambda i: i["classes"].pop()), "a label that is no class", False),
    "index gone": (lambda d: (d / "shard-000002.idx").unlink(), "shard-000002.idx: is missing", True),
    "index empty": (lambda d: (d / "shard-000002.idx").write_bytes(b""), "shard-000002.idx: is not the index", True),
    "index of another tar": (
        lambda d: shutil.copy(d / "shard-000001.idx", d / "shard-000002.idx"), "first in line 2", True),
    "index garbled": (lambda d: (d / "shard-000002.idx").write_bytes(os.urandom(99)), "first in line 1", True),
    "tar gone": (lambda d: (d / SHARD).unlink(), f"{SHARD}: cannot be read: No such file", False),
    "tar cut": (lambda d: os.truncate(d / SHARD, 9000), f"{SHARD}: is no whole tar", False),
    "tar with more behind": (
        lambda d: overwrite(d / SHARD, (d / SHARD).stat().st_size, bytes(512)), "another length than recorded", False),
    "tar header rotten": (
        lambda d: overwrite(d / SHARD, int(row(d, 25)["offset"]) - 512, b"\xff" * 20), "is no whole tar", False),
    "label rotten in the tar": (
        lambda d: overwrite(d / SHARD, 512, b"9"), "row 20 (", False),
    "image rotten": (
        lambda d: overwrite(d / SHARD, int(row(d, 21)["offset"]) + 40, b"\0"), "row 21 (", False),
    "image bad from the start": (
        lambda d: plant(d, image_bytes(1)[:600]), f"{SHARD}: has images that cannot be used: row 21", False),
}  # fmt: skip


def test_a_good_dataset_is_fine(photo_dataset_path: Path, photo_dataset: ShardSet) -> None:
    found = check(photo_dataset_path)
    assert found.fine
    assert (found.samples, found.shards, found.decoded, found.shard_samples) == (48, 5, 48, (8, 10))
    assert found.class_counts == {"cat": 12, "dog": 12, "fish": 12, "newt": 12}
    assert (found.unlabelled, found.duplicates.groups) == (0, 0)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_mended_if_the_tars_are_whole(kind: str, copy: Path, photo_dataset_path: Path) -> None:
    damage, message, can_be_mended = DAMAGE[kind]
    damage(copy)
    found = check(copy)
    assert not found.fine
    assert any(message in str(one) for one in found.damage), [str(one) for one in found.damage]
    tars = {name: data for name, data in tree(copy).items() if name.endswith(".tar")}
    if can_be_mended:
        repair_dataset(copy, 1, quiet=True, in_process=True)
        assert check(copy).fine
        ours, theirs = tree(copy), tree(photo_dataset_path)
        assert set(ours) == set(theirs)
        same = {name for name in ours if ours[name] == theirs[name]}
        assert set(ours) - same <= ({"dataset.json"} if kind in ("record gone", "record garbled") else set())
    else:
        before = tree(copy)
        try:
            repair_dataset(copy, 1, quiet=True, in_process=True)
        except UserError:
            assert tree(copy) == before
        assert not check(copy).fine
    assert tars == {name: data for name, data in tree(copy).items() if name.endswith(".tar")}


def test_without_its_record_a_dataset_keeps_everything_but_names(copy: Path, photo_dataset: ShardSet) -> None:
    for name in ("dataset.json", "samples.npy", "shard-000003.idx"):
        (copy / name).unlink()
    with pytest.raises(UserError, match="is no dataset"):
        ShardSet.open(copy)
    done = repair_dataset(copy, 1, quiet=True, in_process=True)
    assert done.rewritten == ("dataset.json", "samples.npy", "shard-000003.idx")
    assert "the names of the classes (the 4 classes are called by their numbers now)" in done.lost[0]
    repaired = ShardSet.open(copy)
    assert np.array_equal(repaired.samples, photo_dataset.samples)
    assert repaired.classes == ("0", "1", "2", "3")
    assert [repaired.key(i) for i in range(48)] == [photo_dataset.key(i) for i in range(48)]


def test_without_a_record_images_that_cannot_be_decoded_are_left_out(copy: Path) -> None:
    where = row(copy, 21)
    overwrite(copy / SHARD, int(where["offset"]), bytes(int(where["length"])))
    (copy / "dataset.json").unlink()
    done = repair_dataset(copy, 1, quiet=True, in_process=True)
    assert any(what.startswith("1 entries of the tars") for what in done.lost)
    assert (check(copy).samples, ShardSet.open(copy).num_samples) == (47, 47)
    assert json.loads((copy / "rejected.jsonl").read_text())["name"].startswith(SHARD)


def test_a_changed_tar_is_never_taken_for_what_was_written(copy: Path) -> None:
    overwrite(copy / SHARD, int(row(copy, 21)["offset"]) + 40, b"\0")  # the length stays, and it may even decode
    (copy / "samples.npy").unlink()
    before = tree(copy)
    with pytest.raises(UserError, match=rf"{SHARD} has changed since it was written"):
        repair_dataset(copy, 1, quiet=True, in_process=True)
    assert tree(copy) == before


def test_tars_of_others_are_checked_and_their_index_mended(foreign: Path) -> None:
    whole = tree(foreign)
    assert check(foreign).fine
    for name in ("samples.npy", "index-000001.idx", "rejected.jsonl"):
        (foreign / name).unlink()
    assert not check(foreign).fine
    done = repair_dataset(foreign, 2, quiet=True)
    assert (done.rewritten, done.lost) == (("samples.npy", "rejected.jsonl", "index-000001.idx"), ())
    assert tree(foreign) == whole
    (foreign / "dataset.json").unlink()
    with pytest.raises(UserError, match=r"run make_shards with that SOURCE again"):
        repair_dataset(foreign, 1, quiet=True)


def test_a_refused_image_of_others_is_only_missed_if_no_list_names_it(foreign: Path) -> None:
    (foreign / "rejected.jsonl").write_text("not json\n")
    kinds = [str(damage) for damage in check(foreign).damage]
    assert kinds[0] == "rejected.jsonl: cannot be read"
    assert "leave out images of the tar: deep/er/007" in kinds[1]


def test_a_repair_that_was_killed_begins_again(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tree(copy)
    (copy / "samples.npy").unlink()

    def killed(*_: object, **__: object) -> None:
        (copy / ".partial" / "done").mkdir()
        (copy / ".partial" / "done" / "shard-000000.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.checking.repair.build_missing", killed)
        patch.setattr("pipeline.checking.repair.shutil.rmtree", lambda *_, **__: None)  # as little is done when killed
        with pytest.raises(KeyboardInterrupt):
            repair_dataset(copy, 1, quiet=True)
    repair_dataset(copy, 1, quiet=True, in_process=True)
    assert tree(copy) == whole


def test_a_hostile_record_does_not_make_the_repair_write_elsewhere(copy: Path) -> None:
    edit_record(copy, lambda info: info["shards"][0].update(index="../outside.idx"))
    repair_dataset(copy, 1, quiet=True, in_process=True)  # the record counts as damaged
    assert not (copy.parent / "outside.idx").exists()
    assert check(copy).fine
    edit_record(copy, lambda info: info["shards"][0].update(name="../copy/shard-000000.tar"))
    with pytest.raises(UserError, match=r"delete .* yourself"):
        make_dataset("synthetic:3", copy, ShardingOptions(overwrite=True), quiet=True, in_process=True)
    assert (copy / "shard-000000.tar").exists()


def test_duplicates_are_confirmed_and_their_labels_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, (name, seed) in enumerate([("a", 1), ("a", 1), ("b", 1), ("a", 2), ("b", 3), ("b", 3)]):
        (tmp_path / "in" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name / f"{number}.jpg").write_bytes(image_bytes(seed))
    make_dataset(str(tmp_path / "in"), tmp_path / "out", ShardingOptions(), quiet=True, in_process=True)
    dataset = ShardSet.open(tmp_path / "out")
    numbers = {int(dataset.key(i)[-1]): i for i in range(6)}
    expected = sorted([sorted(numbers[n] for n in (0, 1, 2)), sorted(numbers[n] for n in (4, 5))])
    for at_once in (100, 2):  # in one pass, and in several
        monkeypatch.setattr(pipeline.checking.check_dataset, "KEYS_AT_ONCE", at_once)
        found = find_duplicates(dataset)
        assert [list(group) for group in found.listed] == expected
        assert (found.groups, found.redundant, found.other_labels) == (2, 3, 1)
    assert check(tmp_path / "out").fine


def test_equal_checksums_are_no_proof(photo_dataset_path: Path, copy: Path) -> None:
    def change(rows: np.ndarray) -> None:
        rows["checksum"], rows["length"] = 5, 1000

    edit_rows(copy, change)
    monkey = ShardSet.open(copy, verify_checksums=False)
    assert len(monkey) == 48
    assert find_duplicates(monkey).groups == 0


def test_sampled_images_are_spread_and_always_the_same() -> None:
    options = CheckOptions(decode="sampled", decode_per_shard=3)
    assert decoded_rows(range(100, 201), options) == {100, 150, 200}
    assert decoded_rows(range(5, 7), options) == {5, 6}
    assert decoded_rows(range(100, 201), CheckOptions(decode="none")) == frozenset()
    assert len(decoded_rows(range(100, 201), CheckOptions(decode="full"))) == 101


def test_the_report_does_not_depend_on_the_threads(copy: Path) -> None:
    for kind in ("labels shifted", "image rotten", "index empty"):
        DAMAGE[kind][0](copy)
    assert check(copy, CheckOptions(workers=1)) == check(copy, CheckOptions(workers=4))


@settings(max_examples=50)
@given(data=st.data())
def test_damage_anywhere_is_found_and_nothing_else_happens(photo_dataset_path: Path, data: st.DataObject) -> None:
    """Overwrite, cut or lengthen any file: the check ends with findings, or the dataset reads as it was written."""
    whole = ShardSet.open(photo_dataset_path)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(photo_dataset_path, Path(place) / "copy"))
        file = folder / data.draw(st.sampled_from(["dataset.json", "samples.npy", SHARD, "shard-000003.idx"]))
        content = bytearray(file.read_bytes())
        start = data.draw(st.integers(0, len(content) - 1))
        junk = data.draw(st.one_of(st.binary(max_size=8), st.sampled_from([b"null", b"-1", b"[]", b'"', b"}", b"9e9"])))
        content[start : start + data.draw(st.integers(0, 8))] = junk
        file.write_bytes(content)
        found = check(folder, CheckOptions(decode="none", workers=1))
        if file.suffix != ".json":
            assert found.fine == (file.read_bytes() == (photo_dataset_path / file.name).read_bytes())
        if found.fine:
            dataset = ShardSet.open(folder)
            assert np.array_equal(dataset.samples, whole.samples)
            assert all(dataset.read(i) == whole.read(i) for i in range(48))
        try:
            repair_dataset(folder, 1, quiet=True, in_process=True)
        except UserError:
            return
        assert check(folder, CheckOptions(decode="none", workers=1)).fine or file.suffix == ".json"


def test_members_that_no_sharder_writes_are_named(copy: Path, tmp_path: Path) -> None:
    """Links, devices and names with .. are looked at as names only, and neither check nor repair follows them."""
    before = set(tmp_path.iterdir())
    with tarfile.open(copy / SHARD, "a") as tar:
        for name, kind in (("link.jpg", tarfile.SYMTYPE), ("disk", tarfile.BLKTYPE), ("../../up.jpg", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    said = " ".join(map(str, check(copy).damage))
    for part in ("a link inside an archive", "a device or other special file"):
        assert part in said
    (copy / "dataset.json").unlink()
    repair_dataset(copy, 1, quiet=True, in_process=True)
    assert check(copy).samples == 48
    assert set(tmp_path.iterdir()) == before


def test_a_record_of_rows_with_code_is_not_executed(copy: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(copy / "executed"),)

    np.save(copy / "samples.npy", np.array([Code()], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"samples.npy is missing, damaged"):
        ShardSet.open(copy)
    assert not check(copy).fine
    repair_dataset(copy, 1, quiet=True, in_process=True)
    assert not (copy / "executed").exists()
    assert check(copy).fine


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["check_shards.py", "--quiet", *map(str, arguments)])
    try:
        exit_on_user_error(main)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_the_command(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert command(monkeypatch, copy, "--json", tmp_path / "report.json", "--global-batch", 40) == 0
    said = capsys.readouterr().out
    assert "48 samples in 5 shards of 8 to 10" in said
    assert "an epoch of global batch 40 has 1 steps and leaves out 8 samples" in said
    assert "nothing is damaged" in said
    assert json.loads((tmp_path / "report.json").read_text())["fine"] is True
    DAMAGE["image rotten"][0](copy)
    DAMAGE["index empty"][0](copy)
    assert command(monkeypatch, copy, "--json", tmp_path / "report.json") == 1
    said = capsys.readouterr().out
    assert "DAMAGED  shard-000002.tar: has images that are not what was written: row 21" in said
    assert "too few samples for a global batch of 512" in said
    kinds = {one["where"] for one in json.loads((tmp_path / "report.json").read_text())["damage"]}
    assert kinds == {"shard-000002.tar", "shard-000002.idx"}


def test_the_command_repairs(copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert command(monkeypatch, copy, "--repair", "--workers", 1) == 0
    assert "nothing to repair" in capsys.readouterr().out
    DAMAGE["labels shifted"][0](copy)
    (copy / "dataset.json").unlink()
    assert command(monkeypatch, copy, "--repair", "--workers", 1) == 0
    said = capsys.readouterr().out
    for part in ("repaired: dataset.json", "repaired: samples.npy", "could not be restored: the source"):
        assert part in said


def test_a_dataset_named_from_where_one_stands_is_repaired_too(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy.parent)
    before = (copy / "dataset.json").read_bytes()
    for name in ("samples.npy", "shard-000001.idx"):
        (copy / name).unlink()
    assert command(monkeypatch, copy.name, "--repair", "--workers", 1) == 0
    assert (copy / "dataset.json").read_bytes() == before
    (copy / "dataset.json").unlink()
    assert command(monkeypatch, f"./{copy.name}", "--repair", "--workers", 1) == 0
    assert [shard["name"] for shard in json.loads((copy / "dataset.json").read_text())["shards"]] == [
        shard["name"] for shard in json.loads(before)["shards"]
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "does not exist"),
        (["{copy}/dataset.json"], "is a file: give the folder"),
        (["{empty}"], "is no dataset"),
        (["{empty}", "--repair"], "has neither a readable dataset.json nor tars"),
        (["{half}"], "half-written"),
        (["{half}", "--repair"], "half-written"),
        (["{copy}", "--workers", "-1"], "--workers -1"),
        (["{copy}", "--decode-per-shard", "0"], "--decode-per-shard 0"),
        (["{copy}", "--global-batch", "0"], "--global-batch 0"),
        (["{copy}", "--json", "/nowhere/x.json"], "--json /nowhere/x.json cannot be written: No such file"),
    ],
)
def test_mistakes(
    arguments: list[str], message: str, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "half" / ".partial").mkdir(parents=True)
    shutil.copy(copy / "shard-000000.tar", tmp_path / "half")
    places = {name: str(tmp_path / name) for name in ("empty", "half", "copy")}
    assert command(monkeypatch, *(argument.format(**places) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
