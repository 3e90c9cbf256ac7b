"""Where compiled code is kept: with a read-only checkout and no writable home folder, in the temporary one.

numba and Triton load what lies in their folders as code, so the folder must be this user's alone.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any


def cached_jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """numba.njit with its compiled code kept beside the file or in the home folder, else in a temporary folder."""

    import numba  # 1 s, which a GPU has no need of

    def compiled(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # "no locator available": neither can be written
            numba.config.CACHE_DIR = str(  # type: ignore[attr-defined]
                private_folder("numba")
            )
            return numba.njit(cache=True, **options)(function)

    return compiled


def choose_triton_folder(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let Triton keep its kernels in a temporary folder where the home folder cannot be written."""
    if "TRITON_CACHE_DIR" in environment:
        return
    folder = Path(environment.get("TRITON_HOME") or Path.home()) / ".triton"
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        environment["TRITON_CACHE_DIR"] = str(private_folder("triton"))


def private_folder(name: str) -> Path:
    """A folder of this user in the temporary one, the same each time; a new one if other users could write to it."""
    folder = Path(tempfile.gettempdir()) / f"siamstream-{name}-{os.geteuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not stat.S_IMODE(found.st_mode) & 0o077:
        return folder
    return Path(tempfile.mkdtemp(prefix=f"siamstream-{name}-"))
