"""List and read the images of a zip in place: stored members as byte ranges, deflated members inflated one by one.

Nothing is unpacked to the disk. Refused by name: encrypted members, names that lead out of the archive (zip slip),
links, and compression methods other than "stored" and "deflated". zipfile reads the directory; members are read here,
after PKWARE's APPNOTE.TXT 6.3.
"""

from __future__ import annotations

import contextlib
import stat
import struct
import zipfile
import zlib
from dataclasses import dataclass

from pipeline.common.errors import UserError
from pipeline.common.system import progress
from pipeline.sources.image_file import BadImageError
from pipeline.sources.listing import Listing, ListingBuilder, inside
from pipeline.sources.readers import ContainerReader, Source
from pipeline.sources.remote_path import Handle, SourcePath, known, open_file, pread

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # APPNOTE 4.3.7
_STORED, _DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
_ENCRYPTED, _LATER_SIZES, _UTF8 = 0x1, 0x8, 0x800  # bits of the general purpose flag, APPNOTE 4.4.4
_PIECE = 1 << 16  # bytes of compressed data read at once


def is_zip(path: SourcePath) -> bool:
    """Whether ``path`` starts like a zip, or is an archive with a program in front of it."""
    with open_file(path) as file:
        start = file.read(4)
        return start in (b"PK\x03\x04", b"PK\x05\x06") or (start[:2] in (b"MZ", b"#!") and zipfile.is_zipfile(file))


def open_zip(path: SourcePath, subtree: str, quiet: bool) -> Source:
    """The images of a zip below folder ``subtree``. Raises UserError if its directory is damaged."""
    builder = ListingBuilder(f"{path}{f' below {subtree}' if subtree else ''}")
    try:
        with open_file(path) as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (OSError, UserError):
        raise
    except Exception as error:
        raise UserError(
            f"the zip {path} is damaged, cut off or one of several parts ({error}): fetch it again"
        ) from error
    with progress(quiet, total=len(members), unit=" files", desc=f"listing {path.name}") as bar:
        for member in members:
            _add(builder, member, subtree)
            bar.update(1)
    files = [member for member in members if not _name(member).endswith("/")]
    if files and all(member.flag_bits & _ENCRYPTED for member in files):
        raise UserError(f"all members of the zip {path} are encrypted: unpack it with its password and give the folder")
    return Source(builder.build(), ZipReader((known(path),)))


def _add(builder: ListingBuilder, member: zipfile.ZipInfo, subtree: str) -> None:
    stored = _name(member)
    name = inside(stored, subtree)
    if name is None or stored.endswith("/"):
        return
    if (refusal := _refusal(member, stored)) is not None:
        builder.reject(name, refusal)
    else:
        builder.add(name, member.header_offset, member.file_size)


def _name(member: zipfile.ZipInfo) -> str:
    """The member's name with slashes. Without the UTF-8 flag zipfile assumes DOS letters; many are UTF-8."""
    name = member.orig_filename
    if not member.flag_bits & _UTF8:
        with contextlib.suppress(UnicodeError):  # DOS letters indeed
            name = name.encode("cp437").decode("utf-8")
    return name.replace("\\", "/")


def _refusal(member: zipfile.ZipInfo, name: str) -> str | None:
    if member.flag_bits & _ENCRYPTED:
        return "encrypted inside the zip"
    if name.startswith("/") or ".." in name.split("/") or name[1:3] == ":/":
        return "a name that leads out of the archive"
    if stat.S_ISLNK(member.external_attr >> 16):
        return "a link inside an archive"
    if member.compress_type not in (_STORED, _DEFLATED):
        return f"compressed by method {member.compress_type} inside the zip: only 8 (deflate) is supported"
    return None


@dataclass(frozen=True)
class ZipReader(ContainerReader):
    """Images of a zip; an offset in the listing is that of the member's local header."""

    def read(self, listing: Listing, index: int) -> bytes:
        """One member, inflated. Raises OSError, or BadImageError if the member is damaged."""
        handle, offset = self.locate(int(listing.offsets[index]))
        length = int(listing.lengths[index])
        header = pread(handle, _LOCAL_HEADER.size, offset)
        if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
            raise BadImageError("damaged inside the zip: no header where its directory points")
        _, _, flags, method, _, _, checksum, _, _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        start = offset + _LOCAL_HEADER.size + name_length + extra_length
        data = pread(handle, length, start) if method == _STORED else _inflate(handle, start, length)
        if len(data) != length:
            raise BadImageError("damaged inside the zip: it is shorter than its directory says")
        if not flags & _LATER_SIZES and zlib.crc32(data) != checksum:
            raise BadImageError("damaged inside the zip: its checksum differs")
        return data


def _inflate(handle: Handle, start: int, length: int) -> bytes:
    """``length`` bytes out of the deflate stream at ``start``; fewer if it ends before."""
    inflater, parts, got = zlib.decompressobj(-zlib.MAX_WBITS), [], 0
    while got < length and not inflater.eof:
        packed = pread(handle, _PIECE, start)
        if not packed:
            break
        start += len(packed)
        try:
            part = inflater.decompress(packed, length - got)
        except zlib.error as error:
            raise BadImageError(f"damaged inside the zip: {error}") from None
        parts.append(part)
        got += len(part)
    return b"".join(parts)
