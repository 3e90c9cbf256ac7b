"""List the images of a tar from elsewhere: name, offset and length of each member.

A plain tar is scanned once, header by header, and its images are then read as byte ranges; ImageNet's tar of class tars
and a folder of class tars are read in place in the same way. A compressed tar has no random access and is decompressed
once. Member names are labels only and never become paths.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

from pipeline.common.errors import UserError
from pipeline.common.system import progress
from pipeline.dataset.out_folder import ahead
from pipeline.sources.listing import Listing, ListingBuilder, inside
from pipeline.sources.readers import Spool, mark_spooled, spool_state, spooled
from pipeline.sources.remote_path import RemotePath, SourcePath, handle_of, known, open_file
from pipeline.sources.tar_members import Member, members_within, scan_tar

_COMPRESSED: tuple[tuple[bytes, Any], ...] = ((b"\x1f\x8b", gzip), (b"BZh", bz2), (b"\xfd7zXZ\x00", lzma))
_PIECE = 1 << 20  # bytes


def list_tar(path: SourcePath, subtree: str, quiet: bool) -> Listing:
    """The images of a plain tar below ``subtree``; a tar inside counts as a folder named by its stem."""
    builder = ListingBuilder(f"{path}{f' below {subtree}' if subtree else ''}")
    total, text = path.stat().st_size, f"listing {path.name}"
    with open_file(path) as file, progress(quiet, total=total, unit="B", unit_scale=True, desc=text) as bar:
        for member in scan_tar(path):
            bar.update(member.offset + member.length - bar.n)
            name = inside(member.name, subtree)
            if name is not None and name.endswith(".tar") and member.refusal is None:
                where = f"{member.name} inside {path}"
                for inner in members_within(handle_of(file), member.offset, member.length, where):
                    _add(builder, inner, f"{name[:-4]}/{inner.name}")
            elif name is not None:
                _add(builder, member, name)
    return builder.build()


def list_class_tars(
    root: Path | RemotePath, tars: list[str], subtree: str, quiet: bool
) -> tuple[Listing, list[SourcePath]]:
    """The images in ``tars`` (paths below ``root``), each of which counts as a folder named by its stem.

    The tars are treated as one container: offsets go on from one to the next, in the order of the returned paths.
    """
    builder = ListingBuilder(f"{root}{f' below {subtree}' if subtree else ''}")
    paths: list[SourcePath] = [known(root / tar) for tar in sorted(tars)]
    start = 0
    with progress(quiet, total=len(paths), unit=" tars", desc=f"listing {root}") as bar:
        for tar, path, members in zip(sorted(tars), paths, _members(paths), strict=True):
            for member in members:
                name = inside(f"{tar[:-4]}/{member.name}", subtree)
                if name is not None:
                    _add(builder, member, name, start)
            start += path.stat().st_size
            bar.update(1)
    return builder.build(), paths


def _members(tars: list[SourcePath]) -> Iterator[Iterable[Member]]:
    """The members of each tar; several remote ones are read at a time."""
    if any(isinstance(tar, RemotePath) for tar in tars):
        return ahead(lambda tar: list(scan_tar(tar)), tars)
    return map(scan_tar, tars)


def _add(builder: ListingBuilder, member: Member, name: str, start: int = 0) -> None:
    plain = inside(name, "")
    if plain is not None and member.refusal is not None:
        builder.reject(plain, member.refusal)
    elif plain is not None:
        builder.add(plain, start + member.offset, member.length)


def compression(path: SourcePath) -> Any | None:
    """The module (gzip, bz2, lzma) that opens ``path``, by its first bytes; None if it is not compressed."""
    with open_file(path) as file:
        start = file.read(6)
    return next((module for magic, module in _COMPRESSED if start.startswith(magic)), None)


def unpack_tar(path: SourcePath, spool: Spool, quiet: bool) -> SourcePath:
    """Decompress a tar into ``spool``, unless an earlier run did; returns the path of the plain tar.

    Raises UserError if the archive is damaged or the disk cannot hold it.
    """
    plain = spool.folder / "unpacked.tar"
    state = spool_state([path])
    if spooled(spool.folder, state) and plain.exists():
        return plain
    local = spool.fits(path.stat().st_size, f"unpacking {path}")  # images are hardly smaller in it
    opened, place = spool.file(plain.name, local)
    where = spool.folder.name if local or spool.bucket is None else spool.bucket.place
    try:
        _decompress(path, opened, f"unpacking {path.name} once into {where}", quiet)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk; gzip and bz2 raise OSError without a number for damaged data
        raise UserError(f"{path} is damaged or cut off ({error}): fetch it again") from error
    if local:
        mark_spooled(spool.folder, state)
    return place


def _decompress(path: SourcePath, opened: AbstractContextManager[IO[bytes]], doing: str, quiet: bool) -> None:
    module = compression(path)
    assert module is not None
    text = f"{doing} (removed when the dataset is complete)"
    with (
        open_file(path) as packed,
        progress(quiet, total=path.stat().st_size, unit="B", unit_scale=True, desc=text) as bar,
        module.open(packed) as source,
        opened as file,
    ):
        while piece := source.read(_PIECE):
            file.write(piece)
            bar.update(packed.tell() - bar.n)
