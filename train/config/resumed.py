"""The configuration of --resume: that of the run folder, with which the flags given must agree.

What decides no number (PretrainConfig.identity says which) may change from session to session, and --max-steps holds
for one session.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pipeline.common.errors import UserError
from pipeline.common.locations import local_path
from train.config.config_file import INIT_WEIGHTS, check_urls_are_whole, config_from, read_settings
from train.config.run_config import PretrainConfig
from train.storage.encoder_files import weights_identity
from train.storage.run_folder import CONFIG_FILE

GROUPS = ("model", "views", "extra", "order", "loader", "optim", "cache")  # whose flags have no prefix
Place = tuple[str, ...]  # names of fields, from PretrainConfig inwards
Difference = tuple[Place, Any, Any]  # a setting, its value in the run, and the given one
C = TypeVar("C")


def resumed_config(words: list[str], parse: Callable[[PretrainConfig], PretrainConfig]) -> PretrainConfig | None:
    """The configuration of the run that a command line resumes; None if it resumes none, or one that has not begun.

    ``parse`` reads the command line with the given defaults. Raises UserError where a flag disagrees with the run, or
    where the run folder's config.json cannot be read.
    """
    given = _given(words)
    if not given.resume or given.run_dir is None:
        return None
    run_dir = local_path(given.run_dir)
    if not (run_dir / CONFIG_FILE).exists():
        if given.data is None:
            raise UserError(
                f"--resume, but --run-dir {run_dir} holds no run ({CONFIG_FILE} is not there): name the folder of one, "
                "or add --data and the other flags of a new run"
            )
        return None
    values = read_settings(run_dir / CONFIG_FILE)
    run = config_from(values, PretrainConfig(data=Path(), run_dir=run_dir), str(run_dir / CONFIG_FILE))
    run = replace(run, run_dir=run_dir, resume=False, max_steps=None)
    named = [((name,), getattr(run, name), getattr(given, name)) for name in ("method", "recipe")]
    _check_equal(run, [pair for pair in named if pair[2] not in (None, pair[1])])
    config = parse(replace(run, init=None))
    _check_equal(run, _differences(run, replace(config, init=run.init)))
    if config.init is not None:
        _check_init(run, config.init, values.get(INIT_WEIGHTS))
    check_urls_are_whole(config, run_dir / CONFIG_FILE)
    return replace(config, init=run.init)


def _given(words: list[str]) -> argparse.Namespace:
    """The flags that say which run is meant, before the parser reads the others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=False)
    for flag in ("--run-dir", "--data", "--method", "--recipe"):
        parser.add_argument(flag, nargs="?")
    try:
        return parser.parse_known_args([_hyphened(word) for word in words])[0]
    except argparse.ArgumentError:  # --resume=yes, which the parser of all flags refuses
        return argparse.Namespace(resume=False, run_dir=None)


def _hyphened(word: str) -> str:
    """A flag with hyphens; the parser takes underscores as well."""
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if word.startswith("--") else word


def _differences(run: PretrainConfig, now: PretrainConfig) -> list[Difference]:
    """Settings that are not equal and decide a run's numbers, those alone."""
    if run.identity("") == now.identity(""):
        return []
    former, new = _leaves(run), _leaves(now)
    unequal = [(path, former[path], new[path]) for path in former if former[path] != new[path]]
    return [(path, old, value) for path, old, value in unequal if _decides(run, path, value)] or unequal


def _decides(run: PretrainConfig, path: Place, value: Any) -> bool:
    """Whether the run with this one setting changed is another run."""
    try:
        return _with(run, path, value).identity("") != run.identity("")
    except UserError:  # it goes with another change only
        return True


def _with(config: C, path: Place, value: Any) -> C:
    name, *rest = path
    return replace(config, **{name: _with(getattr(config, name), tuple(rest), value) if rest else value})  # type: ignore[type-var]


def _leaves(config: Any, above: Place = ()) -> dict[Place, Any]:
    """All settings by their path of names."""
    leaves: dict[Place, Any] = {}
    for one in fields(config):
        value, path = getattr(config, one.name), (*above, one.name)
        leaves.update(_leaves(value, path) if is_dataclass(value) else {path: value})
    return leaves


def _check_equal(run: PretrainConfig, differences: list[Difference]) -> None:
    """Raise UserError that lists the differences, if there are any."""
    if not differences:
        return
    lines = [f"  {_flag(path)}: the run has {_shown(old)}, given is {_shown(new)}" for path, old, new in differences]
    hint = ""
    for longer in [new for path, _, new in differences if path == ("epochs",)]:
        hint = (
            "\nThe learning rate follows one curve over all epochs: a run cannot be made longer. For more epochs start "
            f"a new run from its weights: --init {run.run_dir} --epochs {longer} --run-dir NEW_FOLDER"
        )
    raise UserError(
        f"--resume: flags disagree with the run in {run.run_dir} ({CONFIG_FILE}):\n" + "\n".join(lines) + "\n"
        f"leave them out to go on with that run, or name another --run-dir for a new one{hint}"
    )


def _flag(path: Place) -> str:
    """The flag of a setting, as pipeline/common/flags.py names it."""
    words = [word for word in path[:-1] if word not in GROUPS]
    last = "views" if path[-2:] == ("views", "count") else path[-1]
    return "--" + ".".join([*words, last]).replace("_", "-")


def _shown(value: Any) -> str:
    match value:
        case None:
            return "none"
        case bool():
            return "on" if value else "off"
        case tuple():
            return " ".join(map(str, value)) or "none"
        case _:
            return str(value)


def _check_init(run: PretrainConfig, given: Path, recorded: str | None) -> None:
    """Raise UserError unless ``given`` holds the weights that the run began with, whatever the path to them.

    ``recorded``: their identity; None in run folders of earlier versions. Where neither that nor the run's own file is
    left to compare with, the path decides.
    """
    if run.init is None:
        _check_equal(run, [(("init",), None, given)])
        return
    same_path = given.absolute() == run.init.absolute()
    if same_path and not given.exists():
        return
    if recorded is None and run.init.exists():
        recorded = weights_identity(run.init)
    if recorded is None:
        equal = same_path
    else:
        equal = weights_identity(given) == recorded
    if not equal:
        raise UserError(
            f"--resume: --init {given} holds other weights than those which the run in {run.run_dir} began with (from "
            f"{run.init}): leave --init out to go on with that run, or name another --run-dir for a new one"
        )
