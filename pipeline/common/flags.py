"""Groups of flags in --help: a nested configuration whose flags have no prefix, but a box of their own.

    @own_flags
    @dataclass(frozen=True)
    class LoaderConfig: ...

    class RunConfig:
        loader: Annotated[LoaderConfig, group("loader")] = ...

gives ``--threads`` in the box "loader options", where tyro alone would give ``--loader.threads``.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any, ClassVar, TypeVar, get_origin, get_type_hints

import tyro

C = TypeVar("C", bound=type)


def own_flags(cls: C) -> C:
    """A dataclass whose fields are flags of their own name wherever it is nested. Its own annotations are replaced."""
    hints = get_type_hints(cls, include_extras=True)
    for name in list(cls.__annotations__):
        if get_origin(hints[name]) is not ClassVar:
            cls.__annotations__[name] = Annotated[hints[name], tyro.conf.arg(prefix_name=False)]
    return cls


def group(name: str) -> Any:
    """The annotation of a nested configuration whose flags stand in the box ``name``."""
    return tyro.conf.arg(name=name, prefix_name=False)


def usage(required: str) -> str:
    """The command's name for tyro, with its required flags, which a long list of options would push out of the line."""
    return f"{sys.argv[0]} {required}"
