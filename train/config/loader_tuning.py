"""Owns the small file in which profile_throughput.py --tune leaves the loader's best settings for pretrain.py.

It holds settings of LoaderConfig that were measured, and for how many ranks a machine. The order of the samples and
the draws of their views do not depend on them, so a resumed run may take another file; pixels may differ by a decoder's
rounding, where dali.decoder or dali.hw_decoder_load are others.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pipeline.backends.base import DaliConfig
from pipeline.common.errors import UserError
from pipeline.common.files import write_json
from pipeline.loader.config import LoaderConfig

TUNING_VERSION = 1
TUNABLE = ("threads", "prefetch", "read_ahead", "dali.decoder", "dali.hw_decoder_load", "dali.prefetch")


@dataclass(frozen=True)
class LoaderTuning:
    """Measured settings; a setting of the part ``dali`` is named dali.NAME."""

    settings: dict[str, Any]
    ranks_per_machine: int
    evidence: dict[str, Any] = field(default_factory=dict)  # how it was measured, for people

    def fill(self, config: LoaderConfig) -> LoaderConfig:
        """``config`` with the measured settings in place of its own."""
        own = {name: value for name, value in self.settings.items() if "." not in name}
        dali = {name.removeprefix("dali."): value for name, value in self.settings.items() if "." in name}
        return replace(config, **own, dali=replace(config.dali, **dali))


def settings_of(config: LoaderConfig) -> dict[str, Any]:
    """The tunable settings of a configuration."""
    fields = asdict(config)
    dali = fields.pop("dali")
    values = {**fields, **{f"dali.{name}": value for name, value in dali.items()}}
    return {name: values[name] for name in TUNABLE}


def save_tuning(tuning: LoaderTuning, path: Path) -> None:
    """Write the file. Raises OSError as the disk does."""
    write_json(
        path,
        {
            "loader_tuning_version": TUNING_VERSION,
            "ranks_per_machine": tuning.ranks_per_machine,
            "settings": tuning.settings,
            "evidence": tuning.evidence,
        },
    )


def load_tuning(path: Path) -> LoaderTuning:
    """Read the file. Raises UserError if it is missing, no tuning file, or names settings that do not exist."""
    remedy = "write one with tools/profile_throughput.py --tune --tuning-file FILE"
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"--loader-tuning {path} cannot be read: {error.strerror}; {remedy}") from error
    except (ValueError, RecursionError):
        raise UserError(f"--loader-tuning {path} is no JSON: {remedy}") from None
    if not isinstance(value, dict) or value.get("loader_tuning_version") != TUNING_VERSION:
        raise UserError(f"--loader-tuning {path} is no tuning file of version {TUNING_VERSION}: {remedy}")
    settings, ranks = value.get("settings"), value.get("ranks_per_machine")
    if not isinstance(settings, dict) or not isinstance(ranks, int) or ranks < 1:
        raise UserError(f"--loader-tuning {path} lacks its settings or ranks_per_machine: {remedy}")
    if foreign := sorted(set(settings) - set(TUNABLE)):
        raise UserError(f"--loader-tuning {path} names {', '.join(foreign)}; known are {', '.join(TUNABLE)}")
    for name, setting in settings.items():
        _check_setting(path, name, setting)
    return LoaderTuning(settings, ranks, value.get("evidence", {}))


def check_agreement(path: Path, tuning: LoaderTuning, chosen: LoaderConfig) -> None:
    """Raise UserError if the command line gives a setting another value than the file does."""
    values = settings_of(chosen)
    for name, setting in tuning.settings.items():
        if values[name] != setting:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{flag} {values[name]}, but --loader-tuning {path} says {setting}: leave {flag} out, or delete "
                f"{name!r} from the file"
            )


def check_ranks(path: Path | None, local_world_size: int) -> None:
    """Raise UserError if threads were measured for another number of ranks on a machine: cores are shared by them."""
    if path is None:
        return
    tuning = load_tuning(path)
    if "threads" in tuning.settings and tuning.ranks_per_machine != local_world_size:
        raise UserError(
            f"--loader-tuning {path} was measured for {tuning.ranks_per_machine} ranks a machine, this run has "
            f"{local_world_size}: measure again with profile_throughput.py --tune --ranks-per-machine "
            f"{local_world_size}, or delete 'threads' from the file"
        )


def _check_setting(path: Path, name: str, value: Any) -> None:
    owner, field_name = (DaliConfig, name.removeprefix("dali.")) if "." in name else (LoaderConfig, name)
    kind = get_type_hints(owner)[field_name]
    if choices := get_args(kind):
        fits, rule = value in choices, f"one of {', '.join(choices)}"
    elif kind is float:
        fits, rule = _is_number((int, float), value) and 0 <= value <= 1, "a number from 0 to 1"
    else:
        lowest = 0 if name == "threads" else 1
        fits, rule = _is_number(int, value) and value >= lowest, f"a whole number from {lowest} up"
    if not fits:
        raise UserError(f"--loader-tuning {path} has {name} {value!r}: it must be {rule}")


def _is_number(kind: Any, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
