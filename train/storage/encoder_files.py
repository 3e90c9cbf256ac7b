"""Encoders in files: read ours and those of many other projects, build them, start a model from them.

Nothing is unpickled with code: torch's files are read with weights_only, the others are safetensors.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from model.backbone import BACKBONES, Stem, build_backbone, check_backbone, find_backbone, is_users_own
from model.methods.base import Method
from pipeline.common.errors import UserError
from pipeline.common.files import check_regular
from pipeline.dataset.format import file_sha256
from pipeline.sampling.views import IMAGENET_MEAN, IMAGENET_STD, ViewRecipe
from train.storage.checkpoints import HASH_DIGITS, is_damaged, newest_checkpoint
from train.storage.encoder_formats import EncoderState, State, recognise
from train.storage.encoder_layouts import summary
from train.storage.torch_files import read_torch_file

UNTRAINED = "untrained:"
CLASSIFIERS = ("fc", "head", "heads", "classifier", "head_dist")  # modules of libraries that hold one
METADATA = "siamstream"  # key of our entry in a safetensors header, a checkpoint or a state_dict
NESTED = 5  # dictionaries inside each other that are looked into; VISSL has as many
_COUNTER = "num_batches_tracked"  # of BN; files from before torch 0.4.1 have none, and it changes no output


@dataclass(frozen=True)
class InputSpec:
    """What an encoder was trained to see."""

    image_size: int = 224  # px
    mean: tuple[float, ...] = IMAGENET_MEAN  # a number a channel
    std: tuple[float, ...] = IMAGENET_STD

    @property
    def recipe(self) -> ViewRecipe:
        """The recipe of the evaluation view."""
        recipe = ViewRecipe(image_size=self.image_size)
        if len(self.mean) != 3:
            return recipe.of_channels(self.mean, self.std)
        return replace(recipe, mean=self.mean, std=self.std)


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder out of a file, on the CPU."""

    source: str  # the file, for messages
    parts: EncoderState
    backbone: str  # as build_backbone takes it
    stem: Stem
    pixels: InputSpec | None  # None: the file does not say
    identity: str  # changes with the weights
    stem_is_guess: bool = False  # the file does not say, and the weights fit two kinds of first layers

    @property
    def channels(self) -> int:
        """Of the images that it takes."""
        return _channels(self.pixels)

    def describe(self) -> str:
        heads = [name for name in ("projector", "predictor") if getattr(self.parts, name)]
        stem = "" if self.stem == find_backbone(self.backbone).default_stem else f", {self.stem} stem"
        about = f"{self.backbone}{stem} from {self.source} ({' + '.join([f'{self.parts.layout} names', *heads])})"
        if not self.stem_is_guess:
            return about
        other = "cifar (stride 1)" if self.stem == "small" else "small (stride 2)"
        return f"{about}; the stem is a guess, as the weights do not tell: --stem may also be {other}"


def read_weights(path: Path, backbone: str | None = None, stem: Stem | None = None) -> LoadedEncoder:
    """Read an encoder from a file, or from the newest checkpoint of a run folder.

    ``backbone`` and ``stem`` say what it must be; by default that is found out. Raises UserError if it is something
    else, truncated, or no encoder at all.
    """
    path = _file_of(path)
    flat, about = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if about.backbone is not None and is_users_own(about.backbone) and backbone is None:
        raise UserError(  # a file's word must not decide which code is run
            f"{path} was trained with a backbone of your own: add --backbone {about.backbone} to build it"
        )
    known = backbone or about.backbone
    parts = recognise(flat) or _of_library(flat, [known] if known else list(BACKBONES))
    if not flat:
        raise UserError(f"{path} holds no tensors by name: give a checkpoint, or a state_dict saved by torch.save")
    if parts is None:
        raise UserError(
            f"{path} holds no encoder: its entries ({summary(flat)}) are named neither as in siamstream's "
            "checkpoints (backbone.*), nor the official SimSiam's (module.encoder.*), nor as any of "
            f"{', '.join(BACKBONES)} has them in torchvision or timm; say which model it is by --backbone timm:NAME or "
            "torchvision:NAME"
        )
    known_backbone, known_stem = about.backbone, about.stem
    guessed = None
    if known_backbone is None:
        if backbone is not None and len(find_backbone(backbone).stems) == 1:  # no first layers to be found out
            known_backbone = backbone
        else:
            known_backbone, known_stem = _guess(parts.backbone, path)
            guessed = known_stem
    elif known_stem is None and not about.is_ours:
        known_stem = guessed = _fitting_stem(parts.backbone, known_backbone)
    if backbone is not None or stem is not None:
        known_backbone, known_stem = _as_asked(known_backbone, known_stem, backbone, stem)
    known_stem = known_stem or find_backbone(known_backbone).default_stem
    _check_shapes(parts.backbone, known_backbone, known_stem, str(path), about)
    _check_finite(parts, path)
    identity = weights_identity(path)
    unsure = stem is None and guessed == known_stem and known_stem in ("cifar", "small")
    return LoadedEncoder(str(path), parts, known_backbone, known_stem, about.pixels, identity, unsure)


def open_encoder(
    checkpoint: str, backbone: str | None = None, stem: Stem | None = None, seed: int = 0
) -> tuple[nn.Module, int, LoadedEncoder]:
    """The frozen module in evaluation mode, its width, and where it comes from.

    ``checkpoint`` is a path, or ``untrained:BACKBONE``: random weights from ``seed``. Raises as ``read_weights`` does.
    """
    if not checkpoint.startswith(UNTRAINED):
        weights = read_weights(Path(checkpoint), backbone, stem)
        module, width = build_backbone(weights.backbone, weights.stem, weights.channels)
        load_backbone(module, weights)
    else:
        name = checkpoint.removeprefix(UNTRAINED)
        check_backbone(name, stem or "default", "--checkpoint untrained:")
        torch.manual_seed(seed)
        module, width = build_backbone(name, stem or "default")
        digest = hashlib.sha256(f"{name} {stem} {seed}".encode()).hexdigest()[:HASH_DIGITS]
        parts = EncoderState(dict(module.state_dict()))
        weights = LoadedEncoder(f"seed {seed}", parts, name, stem or find_backbone(name).default_stem, None, digest)
    return module.eval().requires_grad_(False), width, weights


def load_backbone(backbone: nn.Module, weights: LoadedEncoder) -> None:
    """Put the weights into a backbone of the same architecture."""
    backbone.load_state_dict(_with_counters(weights.parts.backbone, backbone))


def initialise(model: Method, weights: LoadedEncoder) -> str:
    """Start a model from weights: the backbone, and each head that the file has in the same shape.

    Returns one line that says what was taken. The backbones must have been compared by ``read_weights``.
    """
    load_backbone(model.backbone, weights)
    taken, random = ["backbone"], []
    for name in ("projector", "predictor"):
        head, state = getattr(model, name, None), getattr(weights.parts, name)
        if head is None:
            continue
        expected = head.state_dict()
        if state and _difference(state, {key: value.shape for key, value in expected.items()}) is None:
            head.load_state_dict(_with_counters(state, head))
            taken.append(name)
        elif expected:
            random.append(name)
    rest = f"; {' and '.join(random)} start at random" if random else ""
    return f"{' and '.join(taken)} from {weights.source} ({weights.parts.layout} names){rest}"


@dataclass(frozen=True)
class FileMetadata:
    """What a file says about its weights."""

    backbone: str | None = None
    stem: Stem | None = None
    pixels: InputSpec | None = None
    is_ours: bool = False  # this project wrote it: a stem that it does not name is the backbone's own


def weights_identity(path: Path) -> str:
    """What changes with the weights in a file, or in the newest checkpoint of a run folder. Raises UserError."""
    path = _file_of(path)
    try:
        return file_sha256(path)[:HASH_DIGITS]
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from error


def _file_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    newest = newest_checkpoint(path / "checkpoints") or newest_checkpoint(path)
    for name in ("backbone.safetensors", "model.safetensors"):  # of a run; of timm's and transformers' folders
        if newest is None and (path / name).is_file():
            return path / name
    if newest is None:
        raise UserError(f"there is no checkpoint in {path}: name a file, or the folder of a run that has saved one")
    return newest


def _read_torch(path: Path) -> tuple[State, FileMetadata]:
    content = read_torch_file(path, [argparse.Namespace])  # DINO's checkpoints hold their flags
    if is_damaged(path):
        raise UserError(f"the checkpoint {path} is damaged: its bytes are not those that were written")
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds no weights but a {type(content).__name__}")
    ours = content.get("config") or content.get(METADATA) or getattr(content, METADATA, None)
    return _tensors(content), _about(ours, content.get("arch"))


def _read_safetensors(path: Path) -> tuple[State, FileMetadata]:
    try:
        check_regular(path)
        with safe_open(str(path), framework="pt", device="cpu") as file:
            flat = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no dictionary
            metadata = (file.metadata() or {}).get(METADATA)
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"{path} is no safetensors file, or a truncated one: {error}") from error
    return flat, _about(_parse_metadata(metadata, path), None)


def _parse_metadata(text: str | None, path: Path) -> Any:
    if not text:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(
            f"{path} has metadata under {METADATA!r} that are no JSON: write it again with tools/export_backbone.py, "
            "or save its tensors without them"
        ) from None


def _of_library(flat: State, candidates: list[str]) -> EncoderState | None:
    """The entries of the first candidate that are all there, as its library names them, without a classifier's."""
    for name in candidates:
        entry = find_backbone(name)
        expected = _shapes(name, entry.default_stem)
        rest = [key for key in flat if key not in expected]
        missing = [key for key in expected if key not in flat and not key.endswith(_COUNTER)]
        if not missing and all(key.split(".")[0] in CLASSIFIERS for key in rest):
            backbone = {key: value for key, value in flat.items() if key in expected}
            return EncoderState(backbone, layout="siamstream" if entry.library == "own" else entry.library)
    return None


def _tensors(content: Mapping[Any, Any]) -> State:
    """The weights among what a file holds: itself, or what is called model or state_dict in it."""
    for name in ("model", "state_dict"):
        inner = content.get(name)
        if isinstance(inner, Mapping):
            content = inner
            break
    return dict(_flat(content, ""))


def _flat(content: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Tensor]]:
    """(dotted name, tensor) of all tensors in dictionaries inside each other, as DINO's teacher and student are."""
    for key, value in content.items():
        if not isinstance(key, str) or key.startswith("optim"):
            continue
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_quantized:
                raise UserError(f"{prefix + key} is sparse or quantised: save the weights as ordinary tensors")
            yield prefix + key, value
        elif isinstance(value, Mapping) and prefix.count(".") < NESTED:
            yield from _flat(value, f"{prefix}{key}.")


def _about(config: Any, arch: Any) -> FileMetadata:
    """From the configuration in our own files, or the name that the official code writes."""
    if isinstance(config, Mapping) and isinstance(config.get("model"), Mapping):
        model = config["model"]
        if _is_known(model.get("backbone")):
            stem: Stem | None = model.get("stem") if model.get("stem") in get_args(Stem) else None
            stem = None if stem == "default" else stem
            return FileMetadata(model["backbone"], stem, _pixels(config.get("views")), is_ours=True)
    return FileMetadata(arch) if _is_known(arch) else FileMetadata()


def _is_known(backbone: Any) -> bool:
    return isinstance(backbone, str) and (backbone in BACKBONES or ":" in backbone)


def _pixels(views: Any) -> InputSpec | None:
    """None unless all three are there in our form: a file of others may call anything views."""
    if not isinstance(views, Mapping) or not isinstance(views.get("image_size"), int):
        return None
    mean: Any = views.get("mean")
    std: Any = views.get("std")
    if not _is_colour(mean) or not _is_colour(std) or len(mean) != len(std):
        return None
    return InputSpec(views["image_size"], tuple(mean), tuple(std))


def _channels(pixels: InputSpec | None) -> int:
    return 3 if pixels is None else len(pixels.mean)


def _is_colour(value: Any) -> bool:
    is_list = isinstance(value, (list, tuple)) and len(value) > 0
    return is_list and all(isinstance(channel, (int, float)) for channel in value)


def _as_asked(known: str, known_stem: Stem | None, backbone: str | None, stem: Stem | None) -> tuple[str, Stem]:
    if backbone is not None:
        check_backbone(backbone)
    wanted = backbone or known
    if stem is None or stem == "default":
        stem = known_stem if backbone in (None, known) else None
    stem = stem or find_backbone(wanted).default_stem
    check_backbone(wanted, stem)
    return wanted, stem


def _guess(state: State, path: Path) -> tuple[str, Stem]:
    """The first architecture of which the weights have every name and shape; each one's own stem is tried first."""
    for name, entry in BACKBONES.items():
        for stem in (entry.default_stem, *entry.stems):
            if _difference(state, _shapes(name, stem)) is None:
                return name, stem
    nearest = max(BACKBONES, key=lambda name: _common(state, _shapes(name, BACKBONES[name].default_stem)))
    difference = _difference(state, _shapes(nearest, BACKBONES[nearest].default_stem))
    raise UserError(
        f"{path} holds another architecture than {', '.join(BACKBONES)}; nearest is {nearest}, and there {difference}"
    )


def _fitting_stem(state: State, backbone: str) -> Stem | None:
    """The first of the backbone's stems that the weights fit, its own before the others; None if none does."""
    entry = find_backbone(backbone)
    stems = (entry.default_stem, *entry.stems)
    return next((stem for stem in stems if _difference(state, _shapes(backbone, stem)) is None), None)


def _check_finite(parts: EncoderState, path: Path) -> None:
    """Raise UserError for weights with nan or inf: accuracies of such an encoder would look like numbers."""
    named = {**parts.backbone, **parts.projector, **parts.predictor}
    broken = [name for name, value in named.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise UserError(
            f"{path} holds a broken encoder: nan or inf in {_few(broken)}. Take an earlier checkpoint, of before the "
            "training went wrong"
        )


def _check_shapes(state: State, backbone: str, stem: Stem, source: str, about: FileMetadata) -> None:
    difference = _difference(state, _shapes(backbone, stem, _channels(about.pixels)))
    if difference is None:
        return
    fitting = [
        name for name, entry in BACKBONES.items() if stem in entry.stems and not _difference(state, _shapes(name, stem))
    ]
    remedy = f"; take --backbone {fitting[0]}" if fitting else ""
    if about.backbone is not None:
        remedy = f"; it was trained as {about.backbone}" + (f" with --stem {about.stem}" if about.stem else "")
    raise UserError(f"{source} is no {backbone} with the {stem} stem: {difference}{remedy}")


def _difference(state: State, expected: dict[str, torch.Size]) -> str | None:
    """How names and shapes differ from those expected; None if they do not."""
    missing = [key for key in expected if key not in state and not key.endswith(_COUNTER)]
    extra = [key for key in state if key not in expected]
    shapes = [
        f"{key} is {list(state[key].shape)} instead of {list(shape)}"
        for key, shape in expected.items()
        if key in state and state[key].shape != shape
    ]
    told = [f"{what} {_few(keys)}" for what, keys in (("missing are", missing), ("unknown are", extra)) if keys]
    told += [_few(shapes)] if shapes else []
    return "; ".join(told) or None


def _common(state: State, expected: dict[str, torch.Size]) -> int:
    return sum(key in state and state[key].shape == shape for key, shape in expected.items())


@lru_cache
def _shapes(backbone: str, stem: Stem, channels: int = 3) -> dict[str, torch.Size]:
    with torch.device("meta"):
        module, _ = build_backbone(backbone, stem, channels)
    return {key: value.shape for key, value in module.state_dict().items()}


def _with_counters(state: State, module: nn.Module) -> State:
    counters = {key: value for key, value in module.state_dict().items() if key.endswith(_COUNTER)}
    return {**counters, **state}


def _few(things: list[str]) -> str:
    return ", ".join(things[:3]) + (f" and {len(things) - 3} more" if len(things) > 3 else "")
