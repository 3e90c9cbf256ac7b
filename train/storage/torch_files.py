"""Read untrusted files of torch.save: no code, no more memory than the file has bytes, one kind of error.

state = read_torch_file(path)
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch

from pipeline.common.errors import UserError
from pipeline.common.files import open_regular

LEGACY_START = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # how torch.save's files began before torch 1.6


def read_torch_file(path: Path, classes: Sequence[type] = ()) -> Any:
    """What torch.save wrote to ``path``, on the CPU: tensors, plain values, and instances of ``classes``.

    Raises UserError for whatever else the file is, also where it is no regular file or cannot be read.
    """
    try:
        with open(open_regular(path), "rb") as file:
            _check_container(file, path)
            with torch.serialization.safe_globals(list(classes)):
                return torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))  # behind ten lines of advice to trust the file
        found = f" ({named[1]})" if named is not None else ""
        raise UserError(
            f"{path} is no checkpoint that can be read: it holds more than tensors and plain values{found}, and "
            "code in files is never run; save its state_dict alone"
        ) from error
    except Exception as error:
        raise UserError(f"{path} is no checkpoint, or it is truncated or damaged: {_first_line(error)}") from error


def _check_container(file: IO[bytes], path: Path) -> None:
    """Raise UserError unless the file is one of torch.save's, whose entries are no longer than the file itself."""
    start = file.read(len(LEGACY_START))
    if start != LEGACY_START:
        if not zipfile.is_zipfile(file):
            raise UserError(f"{path} is no checkpoint, or a truncated one: torch.save writes other files")
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
        size = file.seek(0, 2)
        if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or sum(e.file_size for e in entries) > size:
            raise UserError(f"{path} is no checkpoint: torch.save compresses nothing, and its entries are whole")
    file.seek(0)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__
