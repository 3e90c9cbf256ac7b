"""What ``--data`` names: a dataset, or several with weights: ``--data A --data B:0.3``, or ``--data A B:0.3``.

A weight is how often an epoch goes through the dataset: 1, the default, takes each of its samples once, 0.3 takes 30 %
of them, other ones in the next epoch, and 2 takes each twice. So without weights each dataset counts by its size, and
an epoch has as many samples as all of them together. The same as open_clip's --train-data-upsampling-factors.
"""

import argparse
import math
import re
from pathlib import Path
from typing import Annotated, NamedTuple, TypeAlias

import tyro

from pipeline.common.errors import UserError
from pipeline.common.locations import WDS, Url, expanded, location_or_tars

_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<rest>[^?]*)(?P<query>\?.*)?", re.DOTALL)
_BUCKETS = ("s3", "s3a", "gs", "gcs", "hf")  # their URLs have no port
_LIKE_A_NUMBER = re.compile(r"[-+.,]?\d[\d.,_]*([eE][-+]?\d+)?%?|[-+]?(inf|nan)", re.IGNORECASE)


class WeightedPlace(NamedTuple):
    """One dataset of several."""

    place: Path | Url
    weight: float  # passes over it in an epoch

    def __str__(self) -> str:
        """As on the command line."""
        return f"{self.place}:{repr(self.weight).removesuffix('.0')}"


def mixed_data(words: list[str]) -> Path | Url | tuple[WeightedPlace, ...]:
    """The datasets that ``words`` name; the place alone where it is one of weight 1.

    Raises UserError for a weight that is none, and for a dataset named twice.
    """
    if not words:
        raise UserError("--data names no dataset: give the folder that tools/make_shards.py wrote, or its URL")
    parts = tuple(map(weighted_place, words))
    places = [part.place for part in parts]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise UserError(f"--data {place} is named twice: name it once, with the sum of the weights behind a colon")
    return places[0] if len(parts) == 1 and parts[0].weight == 1 else parts


def weighted_place(word: str) -> WeightedPlace:
    """``DIR``, ``DIR:WEIGHT``, ``URL`` or ``URL:WEIGHT``. Raises UserError for a weight that is none.

    Of a URL the weight stands behind the path, before a query; the port of a host is none. A folder whose whole name
    is ``word`` is that folder.
    """
    scheme = WDS if word.startswith(WDS) and not Path(word).exists() else ""
    name = word.removeprefix(scheme)
    url = _URL.fullmatch(name)
    place, colon, weight = (name if url is None else url["rest"]).rpartition(":")
    if not colon or not _is_weight(name, place, weight, url):
        return WeightedPlace(location_or_tars(word), 1.0)
    whole = scheme + (place if url is None else f"{url['scheme']}://{place}{url['query'] or ''}")
    return WeightedPlace(location_or_tars(whole), _parse_weight(whole, weight))


def _is_weight(word: str, place: str, weight: str, url: re.Match[str] | None) -> bool:
    if url is not None:
        has_port = ":" in re.sub(r".*[@\]]", "", place)
        is_port = "/" not in place and not has_port and weight.isdecimal() and url["scheme"] not in _BUCKETS
        return _LIKE_A_NUMBER.fullmatch(weight) is not None and bool(place) and not is_port
    if not place:
        return False
    whole, before = (Path(expanded(text)).exists() for text in (word, place))
    if whole and before and _LIKE_A_NUMBER.fullmatch(weight):
        raise UserError(
            f"--data {word}: there is a folder {word} and a folder {place}: write {word}:1 or {place}/:{weight}"
        )
    return not whole and (before or _LIKE_A_NUMBER.fullmatch(weight) is not None)


def _parse_weight(place: str, text: str) -> float:
    try:
        weight = float(text) if _LIKE_A_NUMBER.fullmatch(text) else math.nan
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise UserError(
            f"--data {location_or_tars(place)}:{text}: the weight behind the colon is a number above 0, the passes "
            "over the dataset in an epoch: 1 for each sample once, 0.3 for 30 % of them, 2 for each twice"
        )
    return weight


def _words(value: Path | Url | tuple[WeightedPlace, ...]) -> list[str]:
    return [str(part) for part in value] if isinstance(value, tuple) else [str(value)]


def _is_data(value: object) -> bool:
    return isinstance(value, Path | Url) or (
        isinstance(value, tuple) and all(isinstance(part, WeightedPlace) for part in value)
    )


# Type of a field in configurations: a dataset, or several.
MixedData: TypeAlias = Annotated[
    Path | Url | tuple[WeightedPlace, ...],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="DIR|URL",
        instance_from_str=mixed_data,
        is_instance=_is_data,
        str_from_instance=_words,
    ),
]


def data_parts(data: Path | Url | tuple[WeightedPlace, ...]) -> tuple[WeightedPlace, ...]:
    """The datasets of a configuration's ``data``, one or several."""
    return data if isinstance(data, tuple) else (WeightedPlace(data, 1.0),)


def gather(words: list[str]) -> list[str]:
    """A command line in which --data, where it is given several times, is given once with all values."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data", nargs="*", action="extend")
    named, others = parser.parse_known_args(words)
    return words if named.data is None else [*others, "--data", *named.data]
