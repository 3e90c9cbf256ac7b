"""A run's configuration in a JSON or YAML file, as config.json in a run folder holds it: read back as dataclasses.

    base = recipe_of("demo")
    values = read_settings(Path("runs/a/config.json"))
    config = config_from(values, base, "runs/a/config.json")      # what the file does not name is as in base

The result is a default for the parser, so that flags override it: train/config/recipes.py.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from model.methods.registry import method_config
from pipeline.common.errors import UserError
from pipeline.common.files import read_regular
from pipeline.common.locations import Url, local_path, location_or_tars
from pipeline.common.mixed_data import WeightedPlace, data_parts, weighted_place
from pipeline.common.secrets import conceal
from train.config.run_config import PretrainConfig

# Keys of config.json that are no settings, or no longer: what a session was run with; the weights of --init; the file
# that --loader-tuning named, whose numbers stand under loader.
SESSION, INIT_WEIGHTS = "session", "init_weights"
_NO_SETTINGS = (SESSION, INIT_WEIGHTS, "loader_tuning")
C = TypeVar("C")


YAML_SUFFIXES = (".yaml", ".yml")


class _Yaml(yaml.SafeLoader):
    """YAML with the plain values of its version 1.2: 1e-4 is a number, on and 10:30 are text; no key twice, no aliases.

    A few lines of aliases stand for a value without an end, or with billions of parts.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As the base class, which takes aliases."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not taken: write the value itself", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the base class, which takes the last of two equal keys."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for place, key in enumerate(keys) if key in keys[:place]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_FLOAT = r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
for _kind_of_value, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?\d+", list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    _Yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_kind_of_value}", re.compile(f"^(?:{_pattern})$"), _first)


def _parse_text(text: str, suffix: str) -> Any:
    """The value in a file. Raises ValueError."""
    if suffix not in YAML_SUFFIXES:
        return json.loads(text)
    try:
        return yaml.load(text, _Yaml)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(_yaml_reason(error)) from error


def _yaml_reason(error: yaml.YAMLError) -> str:
    """What is wrong, and where, without the line itself: it may hold a password."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return conceal(" ".join(str(error).split()))
    mark = error.problem_mark
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    return conceal(where + ", ".join(filter(None, (error.context, error.problem))))


def yaml_text(values: dict[str, Any]) -> str:
    """Settings as a file for --config."""
    return yaml.safe_dump(values, sort_keys=False, width=120, allow_unicode=True)


def read_settings(path: Path, source: str | None = None) -> dict[str, Any]:
    """The object in a JSON or YAML file. Raises UserError, which begins with ``source``, if there is none."""
    source = source or str(path)
    try:
        values = _concealed(_parse_text(read_regular(path).decode(), path.suffix.lower()))
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror}): name the config.json of a run") from error
    except (ValueError, RecursionError) as error:
        kind = "YAML" if path.suffix.lower() in YAML_SUFFIXES else "JSON"
        raise UserError(f"{source} is no {kind} ({error}): name the config.json of a run, or a file like it") from error
    if not isinstance(values, dict):
        raise UserError(f"{source} holds no object with settings: name the config.json of a run, or one like it")
    return values


def _concealed(value: Any) -> Any:
    """``value`` with placeholders for the secrets of URLs, as in arguments: errors show values of any setting."""
    match value:
        case str():
            return conceal(value)
        case dict():
            return {key: _concealed(entry) for key, entry in value.items()}
        case list():
            return [_concealed(entry) for entry in value]
        case _:
            return value


def config_from(values: dict[str, Any], base: PretrainConfig, source: str) -> PretrainConfig:
    """``base`` with ``values`` in their places. Errors are UserErrors that begin with ``source``.

    Where ``values`` name another method than ``base`` has, its model and views start from that method's own.
    """
    method = values.get("method", base.method)
    if method != base.method and isinstance(method, str):
        model = method_config(method)()
        base = replace(base, method=method, model=model, views=model.default_views())
    return _merged(base, {key: value for key, value in values.items() if key not in _NO_SETTINGS}, "", source)


def check_urls_are_whole(config: PretrainConfig, path: Path) -> None:
    """Raise UserError for a URL whose password or signature was left out when it was recorded in ``path``."""
    places = [("--data", part.place) for part in data_parts(config.data)]
    for flag, data in (*places, ("--knn-data", config.knn.data)):
        if isinstance(data, Url) and "***" in data.secret:
            raise UserError(f"{path} holds no passwords and signatures of URLs: give {flag} again, in full ({data})")


def _merged(base: C, values: Any, place: str, source: str) -> C:
    """A dataclass with some of its fields replaced; ``place`` is the dotted name of its key, for errors."""
    if not isinstance(values, dict):
        raise UserError(f"{source} has {place} {_shown(values)}, which has settings of its own: write an object")
    kinds = get_type_hints(type(base))
    names = [one.name for one in fields(base)]  # type: ignore[arg-type]
    changed: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{place}.{key}" if place else key
        if key not in names:
            raise UserError(f"{source} has {name}, which is no setting of a run: {_hint(base, str(key), names)}")
        former = getattr(base, key)
        changed[key] = (
            _merged(former, value, name, source) if is_dataclass(former) else _value(kinds[key], value, name, source)
        )
    return replace(base, **changed)  # type: ignore[type-var]


def _hint(base: Any, key: str, names: list[str]) -> str:
    """Where a setting belongs that is none of ``base``."""
    key = key.replace("-", "_")
    inside = [
        name for name in names if is_dataclass(part := getattr(base, name)) and key in {f.name for f in fields(part)}
    ]
    if inside:
        return f"write it inside {inside[0]}, as {inside[0]}: {{{key}: ...}}"
    near = difflib.get_close_matches(key, names, n=1)
    return f"did you mean {near[0]}?" if near else f"known here are {', '.join(names)}"


def _value(kind: Any, value: Any, name: str, source: str) -> Any:
    """A value of JSON as one of a field's type. Raises UserError if it is none."""
    refusal = UserError(f"{source} has {name} {_shown(value)}, which is no {_kind(kind)}")
    match get_origin(kind) or kind:
        case origin if origin in (Union, UnionType):
            return _one_of(kind, value, name, source, refusal)
        case origin if origin is Literal:
            holds = any(value == known and type(value) is type(known) for known in get_args(kind))
        case origin if origin is tuple:
            return _tuple(kind, value, name, source, refusal)
        case origin if origin is float:
            holds = type(value) in (int, float)
            if holds and abs(value) > sys.float_info.max and isinstance(value, int):
                raise refusal
            value = float(value) if holds else value
        case origin if origin is NoneType:
            holds = value is None
        case origin if origin is WeightedPlace:
            if not isinstance(value, str):
                raise refusal
            return weighted_place(value)
        case origin if origin in (Path, Url):
            if not isinstance(value, str):
                raise refusal
            return local_path(value)
        case origin if is_dataclass(origin):
            assert isinstance(origin, type)
            return _merged(origin(), value, name, source)
        case origin:
            holds = type(value) is origin
    if not holds:
        raise refusal
    return value


def _one_of(kind: Any, value: Any, name: str, source: str, refusal: UserError) -> Any:
    if Url in get_args(kind) and isinstance(value, str):
        return location_or_tars(value)
    for one in get_args(kind):
        try:
            return _value(one, value, name, source)
        except UserError:  # of the next kind, perhaps
            continue
    raise refusal


def _tuple(kind: Any, value: Any, name: str, source: str, refusal: UserError) -> Any:
    if not isinstance(value, list):
        raise refusal
    kinds = get_args(kind)
    kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
    if len(kinds) != len(value):
        raise refusal
    return tuple(
        _value(one, entry, f"{name}[{place}]", source)
        for place, (one, entry) in enumerate(zip(kinds, value, strict=True))
    )


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:60] + "..."


def _kind(kind: Any) -> str:
    """A type as people call it."""
    names = {float: "number", int: "whole number", bool: "true or false", str: "text", NoneType: "null", Path: "path"}
    names[WeightedPlace] = "dataset"
    match get_origin(kind):
        case origin if origin in (Union, UnionType):
            return " or ".join("URL" if one is Url else _kind(one) for one in get_args(kind))
        case origin if origin is Literal:
            return " or ".join(map(json.dumps, get_args(kind)))
        case origin if origin is tuple:
            kinds = get_args(kind)
            inner = "group of views" if is_dataclass(kinds[0]) else _kind(kinds[0])
            return f"list of {inner}s" if kinds[-1] is Ellipsis else f"list of {len(kinds)} {inner}s"
        case _:
            return names.get(kind, "object")
