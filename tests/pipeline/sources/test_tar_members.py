"""The tar reader lists what Python's tarfile lists, and ends with one clear error on every crafted tar."""

from __future__ import annotations

import io
import os
import tarfile
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.common.errors import UserError
from pipeline.sources.tar_members import Member, is_plain_tar, scan_tar

BLOCK = 512
END = bytes(2 * BLOCK)
LONG = "d" * 90 + "/" + "n" * 200 + ".jpg"


def header(name: str = "a.jpg", kind: bytes = b"0", size: bytes = b"%011o\0" % 5, **fields: bytes) -> bytes:
    """A ustar header with a right checksum, whatever its fields hold. ``fields`` are keyed at<start>."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[156:157], block[124:136] = kind, size
    for key, value in fields.items():
        start = int(key.removeprefix("at"))
        block[start : start + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def pax(records: bytes, kind: bytes = b"x") -> bytes:
    return header("pax", kind, b"%011o\0" % len(records)) + padded(records)


def record(key: str, value: str) -> bytes:
    length = len(key) + len(value) + 3
    while len(f"{length} {key}={value}\n") != length:
        length += 1
    return f"{length} {key}={value}\n".encode()


GOOD = header() + padded(b"hello")


def listed(path: Path, content: bytes) -> list[Member]:
    path.write_bytes(content)
    return list(scan_tar(path))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_it_lists_what_tarfile_lists(form: int, tmp_path: Path) -> None:
    names = ["a.jpg", "./b/c.jpg", "/abs.jpg", "../up.jpg", "d" * 80 + "/" + "e" * 90, "folder/"]
    if form != tarfile.USTAR_FORMAT:
        names += [LONG, "日本/é.jpg", b"caf\xe9.jpg".decode("utf-8", "surrogateescape")]
    with tarfile.open(tmp_path / "t.tar", "w", format=form) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = 300 * number, 1e9 + 0.5
            if name.endswith("/"):
                info.type, info.size = tarfile.DIRTYPE, 0
            tar.addfile(info, io.BytesIO(bytes(info.size)))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"special-{kind.decode()}")
            info.type, info.linkname = kind, LONG if form != tarfile.USTAR_FORMAT else "a.jpg"
            tar.addfile(info)
    with tarfile.open(tmp_path / "t.tar") as tar:
        expected = [(m.name, m.offset_data, m.size, m.isreg()) for m in tar if not m.isdir()]
    found = [(m.name, m.offset, m.length, m.refusal is None) for m in scan_tar(tmp_path / "t.tar")]
    assert found == expected
    assert len(found) == len(names) - 1 + 4


def test_large_sizes_are_read_in_both_notations(tmp_path: Path) -> None:
    """Beyond 8 GiB: GNU's base 256 and pax. The file is sparse."""
    size = 9 << 30
    for number, head in enumerate(
        (
            header(size=b"\x80" + size.to_bytes(11, "big")),
            pax(record("size", str(size))) + header(size=b"%011o\0" % 0),
        )
    ):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(head)
        with open(path, "r+b") as file:
            file.truncate(len(head) + size + len(END))
        assert [(m.offset, m.length) for m in scan_tar(path)] == [(len(head), size)]


def test_concatenated_tars_are_read_to_the_end(tmp_path: Path) -> None:
    one, other = header("1.jpg") + padded(b"11111"), header("2.jpg") + padded(b"22222")
    content = one + END + bytes(7 * BLOCK) + other + END + bytes(3 << 20) + header("3.jpg") + padded(b"33333") + END
    found = listed(tmp_path / "t.tar", content)
    assert [(m.name, content[m.offset : m.offset + m.length]) for m in found] == [
        ("1.jpg", b"11111"),
        ("2.jpg", b"22222"),
        ("3.jpg", b"33333"),
    ]


def test_sparse_files_are_refused_and_what_follows_is_found(tmp_path: Path) -> None:
    old = header("old.jpg", b"S", at482=b"\1") + bytes(504) + b"\1" + bytes(7) + bytes(BLOCK) + padded(b"spars")
    new = pax(record("GNU.sparse.major", "1") + record("GNU.sparse.name", "new.jpg")) + header("x") + padded(b"spars")
    found = listed(tmp_path / "t.tar", old + new + GOOD + END)
    assert [(m.name, m.refusal) for m in found] == [
        ("old.jpg", "a sparse file inside an archive"),
        ("new.jpg", "a sparse file inside an archive"),
        ("a.jpg", None),
    ]


NEGATIVE = (b"-0000000005\0", b"\xff" * 11 + b"\x01", b"\xff" * 12, b"\xc0" + bytes(11))
CRAFTED = {
    **{f"negative size {n}": header(size=size) + padded(b"hello") + END for n, size in enumerate(NEGATIVE)},
    "a size of no digits": header(size=b"+5_0        ") + padded(b"hello") + END,
    "a huge size": header(size=b"\x80" + b"\x3f" * 11) + padded(b"hello") + END,
    "a huge octal size": header(size=b"7" * 12) + END,
    "a pax size that is negative": pax(record("size", "-512")) + GOOD + END,
    "a pax size of many digits": pax(record("size", "9" * 5000)) + GOOD + END,
    "a pax size that is huge": pax(record("size", "9" * 19)) + GOOD + END,
    "a pax record longer than its header": pax(b"999 path=x\n") + GOOD + END,
    "a pax record of length 0": pax(b"0 path=x\n") + GOOD + END,
    "a pax record without end": pax(b"11 path=abcd") + GOOD + END,
    "a pax record without =": pax(b"9 path x\n") + GOOD + END,
    "a pax header of a gigabyte": header("p", b"x", b"%011o\0" % (1 << 30)) + GOOD + END,
    "a long name of a gigabyte": header("p", b"L", b"%011o\0" % (1 << 30)) + GOOD + END,
    "a global header of a gigabyte": header("p", b"g", b"%011o\0" % (1 << 30)) + GOOD + END,
    "long names without end": (header("p", b"L", b"%011o\0" % 3) + padded(b"abc")) * 10_000 + GOOD + END,
    "global headers without end": pax(record("comment", "x"), b"g") * 10_000 + GOOD + END,
    "a pax header before the end": pax(record("path", "x")) + END,
    "a sparse map that goes on": header("s", b"S", at482=b"\1") + (bytes(504) + b"\1" + bytes(7)) * 100,
    "a wrong checksum": GOOD[:10] + b"X" + GOOD[11:] + END,
    "a checksum of no digits": GOOD[:148] + b"********" + GOOD[156:] + END,
    "garbage behind the end": GOOD + END + b"garbage".ljust(BLOCK, b"!") + END,
    "half a block behind the end": GOOD + END + b"garbage",
    "no end": GOOD,
    "cut off in a header": GOOD + GOOD[:300],
    "cut off in the contents": GOOD[:-400],
    "empty": b"",
    "text": b"hello\n" * 500,
}


@pytest.mark.parametrize("kind", CRAFTED)
def test_crafted_tars_are_users_errors_at_once(kind: str, tmp_path: Path) -> None:
    (tmp_path / "t.tar").write_bytes(CRAFTED[kind])
    started = time.monotonic()
    with pytest.raises(UserError, match=r"t\.tar is damaged or cut off: .*; fetch it again"):
        list(scan_tar(tmp_path / "t.tar"))
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("start", "name"),
    [(b"\x1f\x8b\x08", "gzip"), (b"BZh9", "bzip2"), (b"\xfd7zXZ\0", "xz"), (b"(\xb5/\xfd", "Zstandard")],
)
def test_compression_is_named(start: bytes, name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"is compressed with {name}.*decompress it first"):
        listed(tmp_path / "t.tar", start + bytes(600))


def test_names_may_hold_anything(tmp_path: Path) -> None:
    content = pax(record("path", "a\0b\x1b[31m.jpg")) + GOOD + header("") + padded(b"hello") + END
    assert [m.name for m in listed(tmp_path / "t.tar", content)] == ["a\0b\x1b[31m.jpg", ""]


def test_what_is_a_tar(tmp_path: Path) -> None:
    for content, expected in ((GOOD + END, True), (END, True), (b"hello" * 200, False), (b"", False), (b"x", False)):
        (tmp_path / "t").write_bytes(content)
        assert is_plain_tar(tmp_path / "t") == expected


WHOLE = pax(record("path", LONG)) + GOOD + header("l", b"L", b"%011o\0" % 9) + padded(b"long.jpg\0") + GOOD + GOOD + END


@settings(max_examples=400, deadline=1000)
@given(
    changes=st.lists(
        st.tuples(st.integers(0, len(WHOLE) - 1), st.one_of(st.binary(min_size=1, max_size=8), st.just(b"7" * 11))),
        min_size=1,
        max_size=4,
    ),
    checksums=st.booleans(),
    cut=st.integers(0, len(WHOLE)),
)
@example(changes=[(124, b"\xff" * 11)], checksums=True, cut=len(WHOLE))
def test_any_bytes_are_listed_or_refused(
    changes: list[tuple[int, bytes]], checksums: bool, cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With ``checksums`` every block that was a header gets a right checksum again, so that its fields are reached."""
    content = bytearray(WHOLE)
    for start, junk in changes:
        content[start : start + len(junk)] = junk
    content = content[:cut]
    if checksums:
        for at in range(0, len(content) - BLOCK + 1, BLOCK):
            if WHOLE[at + 257 : at + 262] == b"ustar":
                content[at + 148 : at + 156] = b" " * 8
                content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + BLOCK])
    path = tmp_path_factory.getbasetemp() / f"fuzz-{os.getpid()}.tar"
    path.write_bytes(content)
    try:
        found = list(scan_tar(path))
    except UserError:
        return
    assert all(0 <= m.offset <= m.offset + m.length <= len(content) for m in found)
    assert [m.offset for m in found] == sorted(m.offset for m in found)
