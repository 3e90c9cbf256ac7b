"""Backbones that this project does not build itself: any of timm's or torchvision's, or a function of the user's.

    timm:NAME           timm.create_model(NAME, num_classes=0), with the image size left open where the model allows it
    torchvision:NAME    torchvision.models.get_model(NAME) without its last linear layer
    MODULE:FUNCTION     a function without arguments that returns an nn.Module, importable from the working folder

All start at random; ``--init`` takes weights. A backbone maps float images ``[n, 3, h, w]`` to pooled features
``[n, d]`` and keeps the state_dict keys of its library.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import sys
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision import models

from pipeline.common.errors import UserError

PROBED_SIDES = (224, 96, 64, 32)  # px; where nothing says how wide the features of a user's backbone are


class ForeignBackbone(NamedTuple):
    """How to build a backbone of a library's or a user's, and the width of its features."""

    build: Callable[[], nn.Module]
    features: int


def is_foreign(name: str) -> bool:
    """Whether the name is of the form LIBRARY:NAME or MODULE:FUNCTION."""
    return ":" in name


@lru_cache
def foreign_backbone(name: str) -> ForeignBackbone:
    """The backbone of such a name. Raises UserError if there is none, or if it gives no pooled features."""
    library, _, rest = name.partition(":")
    if library == "timm":
        return _of_timm(rest)
    if library == "torchvision":
        return _of_torchvision(rest)
    return _of_user(library, rest)


def check_views(name: str, build: Callable[[], nn.Module], features: int, sides: Iterable[int]) -> None:
    """Raise UserError unless the backbone makes pooled features of views with these sides, in px."""
    for side in sorted(set(sides)):
        try:
            shape = _output_shape(build, side)
        except Exception as error:  # of anyone's forward pass; told to the user
            raise UserError(
                f"--backbone {name} cannot take views of {side} px ({str(error).splitlines()[0]}): change --image-size "
                "or the image-size of --more-views; a vision transformer takes multiples of its patch"
            ) from error
        if shape != (2, features):
            raise UserError(
                f"--backbone {name} makes {shape or 'no tensor'} of 2 images, not pooled features (2, {features}): "
                "average over the positions, as x.mean(dim=(2, 3)) does"
            )


def _of_timm(name: str) -> ForeignBackbone:
    import timm  # takes a second

    if not timm.is_model(name):
        near = _near(name, timm.list_models())
        raise UserError(f"--backbone timm:{name}: timm {timm.__version__} has no such model{near}")
    # Vision transformers, and windowed ones, take other sizes than their own where one of these is set.
    settings: list[dict[str, Any]] = [{"dynamic_img_size": True}, {"strict_img_size": False}, {}]
    for more in settings:
        build = partial(timm.create_model, name, pretrained=False, num_classes=0, **more)
        try:
            with torch.device("meta"):
                module: Any = build()
        except TypeError:  # the model knows no such setting
            continue
        return ForeignBackbone(build, getattr(module, "head_hidden_size", module.num_features))
    raise AssertionError("timm builds its own models")


def _of_torchvision(name: str) -> ForeignBackbone:
    known = models.list_models(module=models)
    if name not in known:
        raise UserError(f"--backbone torchvision:{name}: torchvision has no such classifier{_near(name, known)}")

    def build() -> nn.Module:
        module = models.get_model(name, weights=None)
        path, _ = _last_linear(module)
        parent, _, child = path.rpartition(".")
        setattr(module.get_submodule(parent), child, nn.Identity())
        return module

    def _last_linear(module: nn.Module) -> tuple[str, nn.Linear]:
        layers = [(path, layer) for path, layer in module.named_modules() if isinstance(layer, nn.Linear)]
        if not layers:
            raise UserError(f"--backbone torchvision:{name} has no linear classifier to take off: take timm:{name}")
        return layers[-1]

    with torch.device("meta"):
        return ForeignBackbone(build, _last_linear(models.get_model(name, weights=None))[1].in_features)


def _of_user(module_name: str, function_name: str) -> ForeignBackbone:
    name = f"{module_name}:{function_name}"
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except ImportError as error:
        rule = "timm:NAME, torchvision:NAME, or MODULE:FUNCTION of your own, importable from the working folder"
        raise UserError(f"--backbone {name}: {error}; it takes {rule}") from error
    except AttributeError:
        raise UserError(f"--backbone {name}: the module {module_name} has no {function_name}") from None

    def build() -> nn.Module:
        module = function()
        if not isinstance(module, nn.Module):
            raise UserError(f"--backbone {name} returns a {type(module).__name__}, not an nn.Module")
        return module

    return ForeignBackbone(build, _width_of(name, build))


def _width_of(name: str, build: Callable[[], nn.Module]) -> int:
    reasons = []
    for side in PROBED_SIDES:
        try:
            shape = _output_shape(build, side)
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001  # of the user's forward pass; told below
            reasons.append(f"{side} px: {error}")
            continue
        if len(shape) != 2:
            raise UserError(
                f"--backbone {name} makes {shape or 'no tensor'} of 2 images, not pooled features (2, d): average over "
                "the positions, as x.mean(dim=(2, 3)) does"
            )
        return shape[1]
    raise UserError(f"--backbone {name} takes images of none of these sides: {'; '.join(reasons)}")


def _output_shape(build: Callable[[], nn.Module], side: int) -> tuple[int, ...]:
    """The shape that the backbone makes of two images, in training; () if it makes no tensor. Draws no numbers.

    Without computing anything, where the module can do without; else on the CPU.
    """
    try:
        with torch.device("meta"):
            made = build().train()(torch.empty(2, 3, side, side))
    except UserError:
        raise
    except Exception:  # noqa: BLE001  # some modules cannot do without numbers
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            made = copy.deepcopy(build()).train()(torch.zeros(2, 3, side, side))
    return tuple(made.shape) if isinstance(made, Tensor) else ()


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"; near are {', '.join(near)}" if near else ""
