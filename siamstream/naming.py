"""The packages below `siamstream`, by names that leave a user's own model.py or tools/ alone.

In the sources these packages have plain names, by which scripts run by path and the tests import them. Whoever writes
`import siamstream` gets them as `siamstream.pipeline` and so on:

- a wheel holds them in that place, with the imports rewritten by `rewritten` when it is built (setup.py);
- in a checkout, `CheckoutFinder` loads the files of the top-level folders under the long names and rewrites them on
  the way. No .pyc is read or written for them: it would be taken for one of the plain names.

The text of commands is rewritten too, because scripts have no path in a wheel: `python tools/make_shards.py` becomes
`siamstream shard`. Line numbers stay.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from siamstream.commands import COMMANDS

PACKAGES = ("pipeline", "model", "train", "tools")
LONG = "siamstream."
HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent

_IMPORT = re.compile(rf"^(\s*(?:from|import) )({'|'.join(PACKAGES)})\b", re.MULTILINE)
_VERBS = {f"{command.module.replace('.', '/')}.py": verb for verb, command in COMMANDS.items()}
_SCRIPT = "|".join(map(re.escape, _VERBS))
_TORCHRUN = re.compile(rf"(torchrun [^\n]*?)\b({_SCRIPT})")
_PYTHON = re.compile(rf"(?<![\w/])(?:python )?\b({_SCRIPT})")


def rewritten(source: str) -> str:
    """A file's text with the long names of the packages and with the console command in place of scripts' paths."""
    source = _IMPORT.sub(rf"\1{LONG}\2", source)
    source = _TORCHRUN.sub(lambda found: f"{found[1]}-m siamstream {_VERBS[found[2]]}", source)
    return _PYTHON.sub(lambda found: f"siamstream {_VERBS[found[1]]}", source)


def prefix() -> str:
    """What the packages' names begin with in this process: `siamstream.`, or nothing.

    A process that has imported them by their plain names, as scripts run by path and tests do, stays with these: two
    copies of one class would be no instances of each other.
    """
    if any(LONG + name in sys.modules for name in PACKAGES):
        return LONG
    return "" if any(_is_ours(sys.modules.get(name)) for name in PACKAGES) else LONG


def _is_ours(module: ModuleType | None) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve().parent.parent == CHECKOUT


def install_in_checkout() -> None:
    """Make the long names importable in a checkout; in a wheel they are there already."""
    if not (HERE / PACKAGES[0]).is_dir():
        sys.meta_path.insert(0, CheckoutFinder())


class CheckoutFinder(MetaPathFinder):
    """Finds `siamstream.pipeline` and the like in the top-level folders of the checkout."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        short = fullname.removeprefix(LONG)
        if short == fullname or short.partition(".")[0] not in PACKAGES:
            return None
        folder = CHECKOUT.joinpath(*short.split("."))
        for file, below in ((folder / "__init__.py", [str(folder)]), (folder.with_suffix(".py"), None)):
            if file.is_file():
                loader = _RewritingLoader(fullname, str(file))
                return spec_from_file_location(fullname, file, loader=loader, submodule_search_locations=below)
        return None


class _RewritingLoader(SourceFileLoader):
    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> CodeType:  # type: ignore[override]
        return super().source_to_code(rewritten(bytes(data).decode()), path, _optimize=_optimize)

    def path_stats(self, path: Any) -> Any:
        raise OSError("no .pyc")  # importlib's word for a source whose compiled form is neither read nor written
