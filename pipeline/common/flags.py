"""Groups of flags in --help: a nested configuration whose flags have no prefix, but a box of their own.

    @own_flags
    @dataclass(frozen=True)
    class LoaderConfig: ...

    class RunConfig:
        loader: Annotated[LoaderConfig, group("loader")] = ...

gives ``--threads`` in the box "loader options", where tyro alone would give ``--loader.threads``.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro

C = TypeVar("C", bound=type)


def own_flags(cls: C) -> C:
    """A dataclass whose fields are flags of their own name wherever it is nested. Its own annotations are replaced."""
    hints = get_type_hints(cls, include_extras=True)
    for field in fields(cls):
        if field.name in cls.__annotations__:
            cls.__annotations__[field.name] = Annotated[hints[field.name], tyro.conf.arg(prefix_name=False)]
    return cls


def group(name: str) -> Any:
    """The annotation of a nested configuration whose flags stand in the box ``name``."""
    return tyro.conf.arg(name=name, prefix_name=False)
