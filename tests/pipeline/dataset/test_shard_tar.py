"""A shard's tar is what webdataset's TarWriter writes, byte for byte, and its parts lie where it says."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from webdataset import TarWriter

from pipeline.common import files as disk
from pipeline.dataset import shard_tar as shard_tar
from pipeline.dataset.shard_tar import ShardTar

KEY = st.text("abcxyzABC019_-", min_size=1, max_size=70)
MEMBERS = st.dictionaries(st.sampled_from(["jpg", "cls", "png", "bmp", "tiff"]), st.binary(max_size=1600), min_size=1)


@given(st.lists(st.tuples(KEY, MEMBERS), max_size=12))
def test_the_bytes_are_those_of_webdataset(samples: list[tuple[str, dict[str, bytes]]]) -> None:
    ours, theirs = io.BytesIO(), io.BytesIO()
    tar = ShardTar(ours)
    placed = [tar.add(key, members) for key, members in samples]
    sha256 = tar.end()
    with TarWriter(theirs, encoder=False, compress=False, mtime=0) as writer:
        for key, members in samples:
            writer.write({"__key__": key, **members})
    assert ours.getvalue() == theirs.getvalue()
    assert (tar.size, sha256) == (len(ours.getvalue()), hashlib.sha256(ours.getvalue()).hexdigest())
    for (key, members), components in zip(samples, placed, strict=True):
        assert [c.name for c in components] == [f"{key}.{extension}" for extension in sorted(members)]
        for c in components:
            assert ours.getvalue()[c.offset : c.offset + c.length] == members[c.extension]


def test_large_contents_are_read_back_by_tarfile(tmp_path: Path) -> None:
    """Larger than the buffers and than what is brought to the disk at once."""
    contents = [bytes([number]) * (5_000_000 + number) for number in range(5)]
    with open(tmp_path / "shard.tar", "wb", buffering=1 << 20) as file:
        tar = ShardTar(file)
        for number, data in enumerate(contents):
            tar.add(f"{number}", {"jpg": data})
        tar.end()
    with tarfile.open(tmp_path / "shard.tar") as read:
        assert [read.extractfile(member).read() for member in read] == contents  # type: ignore[union-attr]


def test_every_byte_but_the_last_ones_is_sent_to_the_disk_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(shard_tar, "start_writing_back", lambda file, start, length: sent.append((start, length)))
    with open(tmp_path / "shard.tar", "wb") as file:
        tar = ShardTar(file)
        for number in range(7):
            tar.add(f"{number}", {"jpg": bytes(3 << 20)})
    assert [start for start, _ in sent] == [0, sent[0][1]]
    assert all(8 << 20 <= length < 12 << 20 for _, length in sent)


def test_a_system_without_the_hint_does_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "file", "wb") as file:
        file.write(b"abc")
        disk.start_writing_back(file, 0, 3)
        monkeypatch.setattr(disk, "_SYNC_FILE_RANGE", None)
        file.write(b"def")
        disk.start_writing_back(file, 3, 3)
    assert (tmp_path / "file").read_bytes() == b"abcdef"
