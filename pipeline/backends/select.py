"""The choice of the back end. The rest of the code does not know which one runs."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Literal

import torch
from typing_extensions import assert_never

from pipeline.backends.base import Backend
from pipeline.backends.torchvision_backend import TorchvisionBackend
from pipeline.common.errors import UserError
from pipeline.common.system import dali_installed

BackendName = Literal["dali", "torchvision"]


def choose_backend(requested: Literal["auto", "dali", "torchvision"], channels: int = 3) -> tuple[BackendName, str]:
    """The back end that will run, and why. ``channels``: of the images.

    Raises UserError if the one asked for is not installed, or does not take such images.
    """
    if channels != 3 and requested == "dali":
        raise UserError(f"--backend dali takes images of 3 channels, and these have {channels}: --backend torchvision")
    if channels != 3 and requested == "auto":
        return "torchvision", f"the images have {channels} channels"
    installed = dali_installed()
    match requested:
        case "torchvision":
            return "torchvision", "asked for"
        case "dali" if installed:
            return "dali", "asked for"
        case "dali":
            raise UserError(
                "backend dali: NVIDIA DALI is not installed. On Linux install it (pip install nvidia-dali-cuda130); "
                "elsewhere use --backend torchvision"
            )
        case "auto" if installed:
            return "dali", "it is installed"
        case "auto":
            return "torchvision", "DALI is not installed; this back end is several times slower"
        case _:
            assert_never(requested)


def check_compiler(device: torch.device) -> None:
    """Raise UserError where the GPU's kernels cannot be launched: Triton compiles a launcher in C for each of them."""
    if device.type != "cuda":
        return
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    asked = os.environ.get("CC")
    found = shutil.which(asked) if asked else shutil.which("gcc") or shutil.which("clang")
    if found is None:
        what = f"CC={asked} is not found" if asked else "there is no C compiler (gcc or clang)"
    elif not header.is_file():
        what = f"Python's headers are missing ({header})"
    else:
        return
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
    raise UserError(
        f"{what}, and Triton needs one to launch the kernels of the views on a GPU: install it "
        f"(Debian, Ubuntu: apt install gcc {package}; conda: conda install gcc), or name it in CC"
    )


def open_backend(requested: Literal["auto", "dali", "torchvision"], channels: int = 3) -> Backend:
    """The back end that will run. Raises UserError as ``choose_backend``, and for a DALI that cannot be imported."""
    name, _ = choose_backend(requested, channels)
    match name:
        case "dali":
            try:
                from pipeline.backends.dali_backend import DaliBackend
            except (ImportError, OSError) as error:  # OSError: of a library that it loads
                raise UserError(
                    f"backend dali: NVIDIA DALI is installed, but it cannot be imported ({error}). Install it with all "
                    "that it needs (pip install nvidia-dali-cuda130), or take --backend torchvision"
                ) from error
            return DaliBackend()
        case "torchvision":
            return TorchvisionBackend()
        case _:
            assert_never(name)
