"""Opening a dataset and reading from it, whole and damaged."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline.dataset.shard_store
from pipeline.common.errors import UserError
from pipeline.dataset.dataset import BadSampleError, ShardSet
from pipeline.dataset.format import SAMPLE_DTYPE
from pipeline.dataset.shard_store import LocalShards
from pipeline.dataset.shard_tar import split_key
from tests.helpers.photos import CLASSES, PER_CLASS


@pytest.fixture
def own_dataset(photo_dataset_path: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(photo_dataset_path, tmp_path / "copy"))


def test_everything_about_every_sample(photo_dataset: ShardSet, photo_folder: Path) -> None:
    originals = sorted(p.relative_to(photo_folder).as_posix() for p in photo_folder.rglob("*.*"))
    assert photo_dataset.num_samples == len(photo_dataset) == len(CLASSES) * PER_CLASS
    assert (photo_dataset.classes, photo_dataset.has_labels, photo_dataset.seed) == (CLASSES, True, 0)
    assert photo_dataset.samples.dtype == SAMPLE_DTYPE
    seen = set()
    for sample_id in range(len(photo_dataset)):
        key = photo_dataset.key(sample_id)
        source = originals[int(key.split("_")[0])]
        seen.add(source)
        assert photo_dataset.read(sample_id) == (photo_folder / source).read_bytes()
        assert CLASSES[photo_dataset.labels([sample_id])[0]] == source.split("/")[0]
    assert seen == set(originals)


def test_sizes_and_labels_are_vectors(photo_dataset: ShardSet) -> None:
    ids = np.array([3, 3, 0])
    sizes, labels = photo_dataset.sizes(ids), photo_dataset.labels(ids)
    assert (sizes.dtype, sizes.shape, labels.dtype, labels.shape) == (np.int32, (3, 2), np.int32, (3,))
    row = photo_dataset.samples[3]
    assert sizes[0].tolist() == sizes[1].tolist() == [row["height"], row["width"]]


def test_threads_share_a_small_cache_of_open_files(photo_dataset_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.dataset.shard_store, "MAX_OPEN_SHARDS", 1)
    dataset = ShardSet.open(photo_dataset_path)
    expected = [dataset.read(i) for i in range(len(dataset))]
    ids = np.random.default_rng(0).integers(0, len(dataset), 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert all(data == expected[i] for i, data in zip(ids, pool.map(dataset.read, ids), strict=True))
    assert len(dataset._store.open_files) == 1


def test_a_pickled_copy_reads_the_same(photo_dataset: ShardSet) -> None:
    copy = pickle.loads(pickle.dumps(photo_dataset))
    assert copy.fingerprint == photo_dataset.fingerprint
    assert copy.read(7) == photo_dataset.read(7)


def test_the_fingerprint_sees_content_not_place(own_dataset: Path, photo_dataset: ShardSet) -> None:
    assert ShardSet.open(own_dataset).fingerprint == photo_dataset.fingerprint
    info = json.loads((own_dataset / "dataset.json").read_text())
    info["shards"][0]["sha256"] = "0" * 64
    (own_dataset / "dataset.json").write_text(json.dumps(info))
    assert ShardSet.open(own_dataset).fingerprint != photo_dataset.fingerprint


def flip_byte(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_rotten_image_is_named(own_dataset: Path) -> None:
    dataset = ShardSet.open(own_dataset)
    row = dataset.samples[5]
    flip_byte(own_dataset / dataset.shards[row["shard"]].name, int(row["offset"]) + 40)
    with pytest.raises(BadSampleError, match="checksum") as caught:
        dataset.read(5)
    error = caught.value
    assert (error.sample_id, error.shard, error.key) == (5, "shard-000000.tar", dataset.key(5))
    assert pickle.loads(pickle.dumps(error)).reason == error.reason
    assert len(ShardSet.open(own_dataset, verify_checksums=False).read(5)) == row["length"]


def test_a_shard_cut_or_gone_after_opening_gives_bad_samples(own_dataset: Path) -> None:
    dataset = ShardSet.open(own_dataset)
    last = len(dataset) - 1
    shard = own_dataset / dataset.shards[-1].name
    shard.write_bytes(shard.read_bytes()[: int(dataset.samples[last]["offset"]) + 10])
    with pytest.raises(BadSampleError, match="ends early: 10 of"):
        dataset.read(last)
    (own_dataset / "shard-000000.tar").unlink()
    with pytest.raises(BadSampleError, match="No such file"):
        dataset.read(0)


def test_too_many_open_files_is_not_the_samples_fault(
    photo_dataset_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = ShardSet.open(photo_dataset_path)

    def full(*_: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(pipeline.dataset.shard_store.os, "open", full)
    with pytest.raises(OSError, match="Too many"):
        dataset.read(0)


DAMAGE = {
    "no folder": (lambda d: shutil.rmtree(d), "does not exist"),
    "no dataset.json": (lambda d: (d / "dataset.json").unlink(), "no dataset.json"),
    "half-written": (lambda d: [(d / "dataset.json").unlink(), (d / ".partial").mkdir()], "half-written.*goes on"),
    "garbage": (lambda d: (d / "dataset.json").write_text("{"), "damaged"),
    "a list": (lambda d: (d / "dataset.json").write_text("[]"), "damaged"),
    "an entry missing": (lambda d: edit(d, lambda info: info.pop("shards")), "damaged"),
    "another version": (lambda d: edit(d, lambda info: info.update(format_version=99)), "version 99"),
    "wrong sum": (lambda d: edit(d, lambda info: info.update(num_samples=7)), "add up to 7"),
    "a shard missing": (lambda d: (d / "shard-000002.tar").unlink(), "shard-000002.tar is missing"),
    "a shard cut": (lambda d: cut(d / "shard-000002.tar"), "shard-000002.tar has"),
    "no index": (lambda d: (d / "samples.npy").unlink(), "samples.npy is missing"),
    "index cut": (lambda d: cut(d / "samples.npy"), "samples.npy is missing, damaged"),
    "index empty": (lambda d: (d / "samples.npy").write_bytes(b""), "samples.npy is missing, damaged"),
    "index shifted": (lambda d: shift(d / "samples.npy"), "belongs to another dataset"),
    "another array": (lambda d: np.save(d / "samples.npy", np.zeros(48)), "belongs to another dataset"),
    "pickled array": (lambda d: np.save(d / "samples.npy", np.array([{}])), "belongs to another dataset"),
}


def edit(folder: Path, change: object) -> None:
    info = json.loads((folder / "dataset.json").read_text())
    change(info)  # type: ignore[operator]
    (folder / "dataset.json").write_text(json.dumps(info))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def shift(path: Path) -> None:
    rows = np.load(path)
    rows["label"] = np.roll(rows["label"], 1)
    np.save(path, rows)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_dataset_does_not_open(own_dataset: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    damage(own_dataset)
    with pytest.raises(UserError, match=message):
        ShardSet.open(own_dataset)


def test_keys_are_split_as_webdataset_does() -> None:
    assert split_key("a.b/c.d.jpg") == ("a.b/c", "d.jpg")
    assert split_key("c") == ("c", "")


def test_other_tools_read_the_tars(photo_dataset: ShardSet) -> None:
    webdataset = pytest.importorskip("webdataset")
    tars = [str(photo_dataset.shard_path(i)) for i in range(len(photo_dataset.shards))]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert [s["__key__"] for s in samples] == [photo_dataset.key(i) for i in range(len(photo_dataset))]
    assert [int(s["cls"]) for s in samples] == photo_dataset.labels(range(len(photo_dataset))).tolist()
    assert all((s.get("jpg") or s["png"]) == photo_dataset.read(i) for i, s in enumerate(samples))
    with tarfile.open(tars[0]) as tar:
        assert {(m.mtime, m.uid, m.mode) for m in tar} == {(0, 0, 0o444)}


def test_dalis_own_reader_and_index_tool_agree_with_our_index(photo_dataset: ShardSet, tmp_path: Path) -> None:
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali import pipeline_def
    from wds2idx import IndexCreator

    tars = [str(photo_dataset.shard_path(i)) for i in range(len(photo_dataset.shards))]
    ours = [str(photo_dataset.path / shard.index) for shard in photo_dataset.shards]
    with IndexCreator(tars[0], str(tmp_path / "theirs.idx"), verbose=False) as creator:
        creator.create_index()
    assert (tmp_path / "theirs.idx").read_text() == Path(ours[0]).read_text()

    @pipeline_def(batch_size=len(photo_dataset), num_threads=1, device_id=None)
    def read() -> object:
        return tuple(fn.readers.webdataset(paths=tars, index_paths=ours, ext=["jpg;png", "cls"]))

    pipeline = read()
    pipeline.build()
    images, labels = pipeline.run()
    for i in range(len(photo_dataset)):
        assert bytes(np.asarray(images[i])) == photo_dataset.read(i)
        assert int(bytes(np.asarray(labels[i]))) == photo_dataset.labels([i])[0]


@settings(max_examples=100)
@given(data=st.data())
def test_rows_that_are_too_many_to_be_hashed_at_the_start_are_checked_one_by_one(
    photo_dataset_path: Path, data: st.DataObject
) -> None:
    """Garbage in any row of a large samples.npy: the image is right, or the sample is refused as bad."""
    whole = ShardSet.open(photo_dataset_path)
    rows = np.array(whole.samples)
    spoilt = rows.view(np.uint8).reshape(len(rows), -1)
    sample_id, width = data.draw(st.integers(0, 47)), SAMPLE_DTYPE.itemsize
    start = data.draw(st.integers(0, width - 1))
    junk = data.draw(st.one_of(st.binary(min_size=1, max_size=width), st.sampled_from([bytes(width), b"\xff" * width])))
    junk = junk[: width - start]
    spoilt[sample_id, start : start + len(junk)] = np.frombuffer(junk, np.uint8)
    dataset = ShardSet(LocalShards(photo_dataset_path, whole.info["shards"]), whole.info, rows, verify_checksums=True)
    with contextlib.suppress(BadSampleError):
        assert dataset.read(sample_id) == whole.read(sample_id)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damage_anywhere_gives_documented_errors_or_the_right_bytes(
    photo_dataset_path: Path, data: st.DataObject
) -> None:
    """Overwrite, cut or lengthen any file of the dataset: what is read is right, or refused as documented."""
    whole = ShardSet.open(photo_dataset_path)
    with tempfile.TemporaryDirectory() as place:
        copy = Path(shutil.copytree(photo_dataset_path, Path(place) / "copy"))
        name = data.draw(st.sampled_from(["dataset.json", "dataset.json", "samples.npy", "shard-000001.tar"]))
        content = bytearray((copy / name).read_bytes())
        start = data.draw(st.integers(0, len(content) - 1))
        junk = data.draw(st.one_of(st.binary(max_size=8), st.sampled_from([b"null", b"-1", b"[]", b'"', b"}", b"9e9"])))
        content[start : start + data.draw(st.integers(0, 8))] = junk
        (copy / name).write_bytes(content)
        try:
            dataset = ShardSet.open(copy)
        except UserError:
            return
        for sample_id in range(min(len(dataset), len(whole))):
            try:
                image = dataset.read(sample_id)
            except BadSampleError:
                continue
            assert image == whole.read(sample_id)
        assert dataset.labels(range(48)).tolist() == whole.labels(range(48)).tolist()
