"""``~`` is the home folder in every flag of every command that takes a path, however the flag is written."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
import tyro

import benchmarks
import tools
import train
from model.methods.registry import METHODS
from pipeline.common.errors import UserError
from pipeline.common.locations import InputPath, Location, expanded, input_path, local_path, location
from train.config.recipes import parse_config

# Flags of type str that take a path among other words, and those that take none
PATHS_AMONG_WORDS = {"source", "checkpoint", "images", "labels", "against"}
NO_PATHS = {
    *("backbone", "method", "k", "parts", "cache_size", "checkpoint_every", "hang_timeout", "lr_sweep"),
    *("subtree", "test_subtree", "label_column", "image_column", "wds_image_ext", "wds_label_key", "split", "part"),
    *("table", "query", "log", "log_project", "ray_address"),
}


def configurations() -> Iterator[type]:
    """The dataclass of every command: what its module gives to tyro.cli."""
    for package in (train, tools, benchmarks):
        for file in sorted(Path(package.__path__[0]).glob("*.py")):
            if "tyro.cli(" in file.read_text() or file.stem == "pretrain":
                with pytest.MonkeyPatch.context() as patch:
                    patch.syspath_prepend(file.parent)  # scripts of benchmarks/ import each other by their bare names
                    module = importlib.import_module(f"{package.__name__}.{file.stem}")
                named = [one for name, one in vars(module).items() if name.endswith(("Config", "Command"))]
                yield from (one for one in named if is_dataclass(one) and isinstance(one, type))
    yield from METHODS.values()


def leaves(config: type, above: str = "") -> Iterator[tuple[str, str, Any]]:
    """(owner, name, annotated type) of each field, those of nested configurations too."""
    hints = get_type_hints(config, include_extras=True)
    for one in fields(config):
        kind = hints[one.name]
        inner = get_args(kind)[0] if get_origin(kind) is Annotated else kind
        if is_dataclass(inner) and isinstance(inner, type):
            yield from leaves(inner, f"{above}{one.name}.")
        else:
            yield f"{config.__module__}.{config.__name__}", one.name, kind


def parts(kind: Any, specs: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The plain types in an annotation, each with the annotations around it."""
    if get_origin(kind) is Annotated:
        inner, *more = get_args(kind)
        yield from parts(inner, (*specs, *more))
    elif get_args(kind) and not any(isinstance(spec, tyro.constructors.PrimitiveConstructorSpec) for spec in specs):
        for one in get_args(kind):
            yield from parts(one, specs)
    else:
        yield kind, specs


def read(kind: Any, specs: tuple[Any, ...], text: str) -> Any:
    own = [spec for spec in specs if isinstance(spec, tyro.constructors.PrimitiveConstructorSpec)]
    return own[0].instance_from_str([text]) if own else text


EVERY = {f"{owner}.{name}": (name, kind) for config in configurations() for owner, name, kind in leaves(config)}
PATHS = [flag for flag, (_, kind) in EVERY.items() if "pathlib.Path" in str(kind) or Path in get_args(kind)]


def test_the_commands_are_found() -> None:
    for flag in (
        "train.config.run_config.PretrainConfig.init",
        "train.evaluation.features.EncoderConfig.checkpoint",
        "tools.make_shards.Command.source",
        "pipeline.sharding.options.ShardingOptions.classes_from",
        "benchmarks.sharding.Config.json",
    ):
        assert flag in EVERY
    assert len(PATHS) > 50


@pytest.mark.parametrize("flag", PATHS)
def test_every_path_flag_knows_the_home_folder(flag: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    _, kind = EVERY[flag]
    values = [read(one, specs, "~/a/b") for one, specs in parts(kind) if "Path" in str(one)]
    assert values
    assert set(values) == {tmp_path / "a" / "b"}


def test_so_do_paths_among_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = set()
    for flag, (name, kind) in EVERY.items():
        words = [(one, specs) for one, specs in parts(kind) if one is str]
        for one, specs in words:
            knows = read(one, specs, "~/a") == f"{tmp_path}/a"
            assert knows == (name in PATHS_AMONG_WORDS), flag
            assert knows or name in NO_PATHS, f"{flag}: a path, or none?"
            seen.add(name)
    assert seen >= PATHS_AMONG_WORDS


def test_what_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("wds:~/tars/*.tar") == f"wds:{tmp_path}/tars/*.tar"
    assert expanded("a~b") == "a~b"
    assert expanded("./~/x") == "./~/x"
    assert expanded("none") == "none"
    assert expanded("https://host/~name/x") == "https://host/~name/x"
    for read_one in (location, local_path, input_path):
        assert read_one("~no-such-user/x") == Path("~no-such-user/x")  # and no traceback
    with pytest.raises(UserError, match="of this machine"):
        input_path("s3://bucket/file")


def test_a_flag_with_an_equals_sign(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = parse_config(["--data=~/d", "--run-dir=~/r", "--init=~/w.pt", "--cache-dir=~/c", "--knn-data=~/k"])
    read = (config.data, config.run_dir, config.init, config.loader.cache.cache_dir, config.knn.data)
    assert read == tuple(tmp_path / name for name in ("d", "r", "w.pt", "c", "k"))
    assert InputPath is not Location
