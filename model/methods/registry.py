"""The methods by name. Every file of this folder with a MethodConfig is found; none is listed by hand."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from pathlib import Path

from model.methods.base import MethodConfig
from pipeline.common.errors import UserError

DEFAULT_METHOD = "simsiam"


def _find() -> dict[str, type[MethodConfig]]:
    for file in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if file.name != "registry":
            importlib.import_module(f"{__package__}.{file.name}")
    found = {config.name: config for config in MethodConfig.__subclasses__()}
    return {DEFAULT_METHOD: found.pop(DEFAULT_METHOD), **dict(sorted(found.items()))}


METHODS: dict[str, type[MethodConfig]] = _find()


def method_config(name: str) -> type[MethodConfig]:
    """The configuration class of a method. Raises UserError for an unknown name."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--method {name} is unknown; known are {', '.join(METHODS)}{hint}")
    return METHODS[name]
