"""What a user names as a dataset: a folder, or a URL whose secrets are never printed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeAlias
from urllib.parse import quote, urlsplit, urlunsplit

import tyro

from pipeline.common.errors import UserError
from pipeline.common.secrets import conceal, reveal

WDS = "wds:"  # prefix of WebDataset tars of others, which stay where they are and are read through an index
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://")
_LIKE_A_URL = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]+(?:::|:\s*/)")


class Url:
    """The folder of a remote dataset. ``str`` leaves out the password and the query, which may be a signature.

    Not a dataclass, so that ``asdict`` of a configuration keeps it as it is.
    """

    def __init__(self, secret: str) -> None:
        """``secret``: the complete URL."""
        self.secret = secret  # only for the file system that reads it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Url) and self.secret == other.secret

    def __hash__(self) -> int:
        return hash(self.secret)

    def __str__(self) -> str:
        """Scheme, host and path, without secrets."""
        parts = urlsplit(self.secret)
        host = "***@" + parts.netloc.rpartition("@")[2] if "@" in parts.netloc else parts.netloc
        return urlunsplit((parts.scheme, host, parts.path, "***" if parts.query else "", ""))

    def __repr__(self) -> str:
        return f"Url({str(self)!r})"

    @property
    def scheme(self) -> str:
        """Such as ``s3`` or ``https``."""
        return urlsplit(self.secret).scheme

    def file(self, name: str) -> Url:
        """A file in this folder, ``name`` being relative with slashes. Over HTTP a query follows the file's name."""
        if self.scheme not in ("http", "https"):
            return Url(f"{self.secret.rstrip('/')}/{name}")
        parts = urlsplit(self.secret)
        path = f"{parts.path.rstrip('/')}/{quote(name)}"
        return Url(urlunsplit((parts.scheme, parts.netloc, path, parts.query, "")))


class TarPattern(Url):
    """WebDataset tars of others, written wds:s3://BUCKET/{000..146}.tar, or wds:/data/*.tar of this machine.

    ``secret`` is without wds:.
    """

    @property
    def is_local(self) -> bool:
        """Whether they lie on a disk of this machine."""
        return not is_url(self.secret)

    def __str__(self) -> str:
        """As on the command line, without secrets."""
        return f"{WDS}{self.secret if self.is_local else super().__str__()}"


def is_url(text: str) -> bool:
    """Whether ``text`` is written like a URL, as s3://BUCKET/FOLDER."""
    return _SCHEME.match(text) is not None


def location(text: str) -> Path | Url:
    """The folder or URL that ``text`` names. Raises UserError for a URL without a host or bucket."""
    _check_name(text)
    if _SCHEME.match(text) is None:
        if text.startswith(WDS) and not Path(text).exists():
            raise UserError(
                f"{text}: tars of others are read through an index, which is made once: siamstream shard '{text}' OUT "
                "--index-only; then give OUT in their place"
            )
        _check_no_url(text)
        return Path(expanded(text))
    shown, text = text, reveal(text)
    _check_secret(text)
    if not urlsplit(text).netloc:
        raise UserError(f"{shown} names no host or bucket: write it as s3://BUCKET/FOLDER or https://HOST/FOLDER")
    return Url(text)


def location_or_tars(text: str) -> Path | Url:
    """As ``location``; wds:PATTERN gives a TarPattern, of which pipeline/sharding/index_cache.py makes a dataset."""
    pattern = text.removeprefix(WDS)
    if pattern == text or Path(text).exists():
        return location(text)
    if not pattern:
        raise UserError(
            f"{text} names no tars: write it as {WDS}/data/{{000..146}}.tar or {WDS}s3://BUCKET/{{0..9}}.tar"
        )
    place = location(pattern)
    return TarPattern(place.secret if isinstance(place, Url) else str(place.absolute()))


def _check_name(text: str) -> None:
    if "\0" in text:
        raise UserError(f"{text!r}: no file or folder has a NUL in its name")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise UserError(f"{text!r}: no file or folder has such a character in its name") from None


def _check_no_url(text: str) -> None:
    """Raise UserError for what looks like a URL and is none, unless a file of that name is there."""
    if _LIKE_A_URL.match(text) and not Path(text).exists():
        raise UserError(
            f"{text} is written like a URL, but not as one: a scheme in small letters, a colon and two slashes come "
            "first, as in s3://BUCKET/FOLDER or https://HOST/FOLDER"
        )


def _check_secret(text: str) -> None:
    """Raise UserError, without the URL, if a character in its password would be parsed as another part of the URL."""
    try:
        parts = urlsplit(text)
        _ = parts.port  # raises if it is not a number
        cut = ":" in parts.netloc and "@" not in parts.netloc and "@" in text
    except ValueError:
        cut = True
    if cut:
        raise UserError(
            f"the {text.partition(':')[0]} URL cannot be read: a port is a number, and in a user name, a password or a "
            "path / is written %2F, : %3A, ? %3F, # %23, @ %40 and [ %5B"
        )


def local_path(text: str) -> Path:
    """The path that ``text`` names, for results. Raises UserError for a URL; Path would turn it into folder ``s3:``."""
    _check_name(text)
    if text.encode(errors="ignore").decode() != text:
        raise UserError(f"{text}: its name is not UTF-8, in which TensorBoard and others write names: choose another")
    if _SCHEME.match(text) or (_LIKE_A_URL.match(text) and not Path(text).exists()):
        raise UserError(f"{text}: results are written to a folder or file of this machine, or one that it has mounted")
    return Path(expanded(text))


def input_path(text: str) -> Path:
    """The file or folder that ``text`` names, for reading. Raises UserError for a URL."""
    if _SCHEME.match(text):
        raise UserError(f"{conceal(text)}: this is read from a file or folder of this machine: copy it here first")
    _check_name(text)
    return Path(expanded(text))


def expanded(text: str) -> str:
    """``text`` with a ~ at its beginning, or after a prefix as in wds:~/tars, replaced by the home folder.

    A shell does so for a word alone, but neither in ``--flag=~/file`` nor after a prefix.
    """
    match = re.fullmatch(r"((?:[a-z]+:)?)(~.*)", text, re.DOTALL)
    return text if match is None else match[1] + os.path.expanduser(match[2])


def _named_by(parse: Callable[[str], Any], metavar: str, kind: Any) -> tyro.constructors.PrimitiveConstructorSpec[Any]:
    """How tyro reads and prints a field that is one word."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: parse(words[0]),
        is_instance=lambda value: isinstance(value, kind),
        str_from_instance=lambda value: [str(value)],
    )


# Types of fields in configurations, all with ~ for the home folder: a dataset to read,
Location: TypeAlias = Annotated[Path | Url, _named_by(location, "DIR|URL", Path | Url)]
# as well as tars of others, where these can take the place of a dataset,
DatasetPlace: TypeAlias = Annotated[Path | Url, _named_by(location_or_tars, "DIR|URL", Path | Url)]
# or, where it may be left out, None,
OptionalDataset: TypeAlias = Annotated[
    Path | Url | None,  # DatasetPlace | None would let tyro warn of a default that is none of these
    _named_by(lambda text: None if text == "None" else location_or_tars(text), "DIR|URL", Path | Url | None),
]
# a path to write,
LocalPath: TypeAlias = Annotated[Path, _named_by(local_path, "PATH", Path)]
# a file or folder of this machine to read,
InputPath: TypeAlias = Annotated[Path, _named_by(input_path, "PATH", Path)]
# and a path, or a word that stands for something else.
PathText: TypeAlias = Annotated[str, _named_by(expanded, "PATH", str)]
