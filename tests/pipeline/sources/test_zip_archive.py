"""A zip gives what its folder gives, read in place; members that are hostile, encrypted or damaged are named."""

from __future__ import annotations

import contextlib
import pickle
import random
import shutil
import stat
import zipfile
from pathlib import Path

import pytest

from pipeline.common.errors import UserError
from pipeline.sources.image_file import BadImageError
from pipeline.sources.readers import Source
from tests.helpers.photos import image_bytes
from tests.pipeline.sources.test_sources import contents, open_it


def zip_with(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return path


def zip_of(folder: Path, path: Path, method: int, inside: str = "") -> Path:
    files = {f"{inside}{file.relative_to(folder)}": file.read_bytes() for file in folder.rglob("*.*")}
    return zip_with(path, files, method)


def names_of(source: Source) -> list[str]:
    return [source.listing.name(index) for index in range(len(source.listing))]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_gives_what_its_folder_gives(method: int, photo_folder: Path, tmp_path: Path) -> None:
    archive = zip_of(photo_folder, tmp_path / "photos.zip", method, inside="./set/train/")
    whole = contents(open_it(photo_folder, tmp_path / "spool"))
    source = open_it(archive, tmp_path / "spool", subtree="set/train")
    assert contents(source) == whole
    assert source.listing.fingerprint() == open_it(photo_folder, tmp_path / "spool").listing.fingerprint()
    assert contents(Source(source.listing, pickle.loads(pickle.dumps(source.reader)))) == whole
    assert not list((tmp_path / "spool").iterdir())
    with open(tmp_path / "program.zip", "wb") as file:  # a program in front of it
        file.write(b"#!/bin/sh\nexit\n" + archive.read_bytes())
    assert contents(open_it(tmp_path / "program.zip", tmp_path / "spool", subtree="set/train")) == whole


def test_members_written_as_a_stream_have_their_sizes_behind_them(tmp_path: Path) -> None:
    class Pipe:
        def __init__(self, path: Path) -> None:
            self.file = open(path, "wb")  # noqa: SIM115
            self.write, self.flush, self.close = self.file.write, self.file.flush, self.file.close

    pipe = Pipe(tmp_path / "s.zip")
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:  # type: ignore[call-overload]
        archive.writestr("a/1.jpg", image_bytes(1))
        archive.writestr("b/2.jpg", image_bytes(2))
    pipe.close()
    source = open_it(tmp_path / "s.zip", tmp_path / "spool")
    assert [data for _, data in contents(source).values()] == [image_bytes(1), image_bytes(2)]


def test_hostile_members_are_refused_by_name(tmp_path: Path) -> None:
    data = image_bytes(1)
    path = zip_with(
        tmp_path / "z.zip", {"c/good.jpg": data, "../slip.jpg": data, "/abs.jpg": data, "x/../../y.jpg": data}
    )
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("C:\\windows.jpg", data)
        archive.writestr("c\\back.jpg", data)
        archive.writestr("c/.hidden.jpg", data)
        archive.writestr("__MACOSX/c/mac.jpg", data)
        archive.writestr("c/lzma.jpg", data, zipfile.ZIP_LZMA)
        archive.writestr("c/inner.zip", b"PK")
        link = zipfile.ZipInfo("c/link.jpg")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    content = bytearray(path.read_bytes())
    at = content.rindex(b"c/good.jpg") - 46  # its entry in the directory
    source = open_it(path, tmp_path / "spool")
    assert names_of(source) == ["c/back.jpg", "c/good.jpg"]
    assert {entry.name: entry.reason for entry in source.listing.rejected} == {
        "slip.jpg": "a name that leads out of the archive",
        "abs.jpg": "a name that leads out of the archive",
        "x/y.jpg": "a name that leads out of the archive",
        "C:/windows.jpg": "a name that leads out of the archive",
        "__MACOSX/c/mac.jpg": "in a folder of the system or of a device, not of images",
        "c/lzma.jpg": "compressed by method 14 inside the zip: only 8 (deflate) is supported",
        "c/inner.zip": "not an image file",
        "c/link.jpg": "a link inside an archive",
    }
    content[at + 8] |= 1  # encrypted
    path.write_bytes(content)
    source = open_it(path, tmp_path / "spool")
    assert names_of(source) == ["c/back.jpg"]
    assert ("c/good.jpg", "encrypted inside the zip") in {(e.name, e.reason) for e in source.listing.rejected}
    zip_with(path, {"a.jpg": data, "folder/": b""})
    content = bytearray(path.read_bytes())
    content[content.rindex(b"a.jpg") - 46 + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="are encrypted: unpack it"):
        open_it(path, tmp_path / "spool")


def test_a_claim_of_a_huge_size_costs_nothing(tmp_path: Path) -> None:
    path = zip_with(tmp_path / "z.zip", {"a.jpg": bytes(1000), "b.jpg": b"x"})
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = (3 << 30).to_bytes(4, "little")
    path.write_bytes(content)
    source = open_it(path, tmp_path / "spool")
    assert (names_of(source), source.listing.rejected[0].reason) == (["b.jpg"], "larger than 1,024 MiB")


def test_damage_inside_is_named(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(5000)
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = zip_with(tmp_path / "z.zip", {"a.jpg": data}, method)
        source = open_it(path, tmp_path / "spool")
        whole = path.read_bytes()
        for damaged in (whole[:2000] + bytes(40) + whole[2040:], b"XX" + whole[2:], whole[:3000]):
            path.write_bytes(damaged)
            with pytest.raises(BadImageError, match="damaged inside the zip"):
                source.reader.read(source.listing, 0)
            path.write_bytes(whole)


@pytest.mark.parametrize("seed", range(60))
def test_archives_of_any_bytes_are_listed_or_refused(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    path = zip_with(tmp_path / "z.zip", {f"c/{n}.jpg": image_bytes(n, 8, 8) for n in range(3)})
    content = bytearray(path.read_bytes())
    start = content.index(b"PK\x01\x02")
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(start, len(content))
        content[at : at + 4] = rng.choice([b"\xff" * 4, bytes(4), rng.randbytes(4), b"\x7f\xff\xff\xff"])
    path.write_bytes(content)
    try:
        source = open_it(path, tmp_path / "spool")
    except UserError:
        return
    for index in range(len(source.listing)):
        with contextlib.suppress(BadImageError):
            assert len(source.reader.read(source.listing, index)) == source.listing.lengths[index]


def test_a_damaged_directory_is_a_users_error(photo_folder: Path, tmp_path: Path) -> None:
    archive = Path(shutil.make_archive(str(tmp_path / "photos"), "zip", photo_folder))
    archive.write_bytes(archive.read_bytes()[:-500])
    with pytest.raises(UserError, match=r"photos\.zip is damaged, cut off or one of several parts"):
        open_it(archive, tmp_path / "spool")


def test_names_in_other_letters(tmp_path: Path) -> None:
    path = zip_with(tmp_path / "z.zip", {"日本/é.jpg": b"x"})
    content = path.read_bytes()
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # as archivers write that do not set the flag
        start = content.index(signature)
        content = content[: start + at] + b"\0\0" + content[start + at + 2 :]
    path.write_bytes(content)
    assert names_of(open_it(path, tmp_path / "spool")) == ["日本/é.jpg"]
