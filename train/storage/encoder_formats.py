"""The names of weights in files, ours and others'. Pure: dictionaries of tensors in, dictionaries out.

- siamstream: ``backbone.*``, ``projector.*``, ``predictor.*``; the backbone's own keys are torchvision's
- official (facebookresearch/simsiam, and what is derived from it): ``module.encoder.*`` is torchvision's ResNet whose
  ``fc`` is the projector, ``module.predictor.*`` the predictor
- torchvision, and timm, which took its names for ResNets from there: ``conv1.*`` to ``layer4.*``, classifier ``fc.*``
- a ResNet in the checkpoint of another project, by any prefix: encoder_layouts.py
- detectron2: ``stem.conv1.*``, ``res2.0.conv1.norm.*``, ..., as its tools/convert-torchvision-to-d2.py names them
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch

from pipeline.common.errors import UserError
from train.storage.encoder_layouts import State, find_resnets, torchvision_names, without_heads
from train.storage.encoder_layouts import below as _below

WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel and torch.compile put these before every name


@dataclass(frozen=True)
class EncoderState:
    """Weights under this project's names, whatever they were called in their file."""

    backbone: State  # torchvision's keys, no heads
    projector: State = field(default_factory=dict)  # keys of model.heads.Projector; empty: the file has none
    predictor: State = field(default_factory=dict)  # keys of model.heads.Predictor; empty: the file has none
    layout: str = "siamstream"  # whose names the file had, for people


def recognise(flat: State) -> EncoderState | None:
    """Sort the entries of a file into backbone, projector and predictor; None if the names tell nothing."""
    for wrapper in (*WRAPPERS, *WRAPPERS):  # one may be inside the other
        if flat and all(key.startswith(wrapper) for key in flat):
            flat = _below(flat, wrapper)
    if any(key.startswith("backbone.") for key in flat):
        backbone = _below(flat, "backbone.")
        return EncoderState(
            torchvision_names(backbone) or backbone,
            _below(flat, "projector."),
            _below(flat, "predictor."),
            "siamstream",
        )
    if "encoder.conv1.weight" in flat:
        encoder = _below(flat, "encoder.")
        return EncoderState(
            without_heads(encoder), _projector(_below(encoder, "fc.")), _below(flat, "predictor."), "official"
        )
    if "conv1.weight" in flat:
        return EncoderState(without_heads(flat), layout="torchvision")
    prefixes = find_resnets(flat)
    if len(prefixes) > 1:
        raise UserError(
            f"the file holds {len(prefixes)} encoders, below {', '.join(prefixes)}: save the one that you mean in a "
            "file of its own"
        )
    for prefix in prefixes:
        found = torchvision_names(_below(flat, prefix))
        assert found is not None
        return EncoderState(
            found, _projector(_below(flat, f"{prefix}fc.")), layout=f"{prefix}*" if prefix else "transformers"
        )
    return None


def to_official(parts: EncoderState) -> State:
    """The names of the official code, which wraps its model in DistributedDataParallel."""
    projector = dict(parts.projector)
    last = _last_linear(projector)
    if last is not None and f"{last}.bias" not in projector and f"{last + 1}.running_mean" in projector:
        # There the last linear layer keeps a bias, though a BN takes it away again. Zero is exact.
        projector[f"{last}.bias"] = torch.zeros(len(projector[f"{last}.weight"]))
    names = {**_under("encoder.", parts.backbone), **_under("encoder.fc.", projector)}
    return _under("module.", {**names, **_under("predictor.", parts.predictor)})


def to_detectron2(backbone: State) -> State:
    """The names of detectron2's ResNets, for its name-matching heuristics; it has no counters of BN batches."""
    return {_detectron2_name(key): value for key, value in backbone.items() if not key.endswith("num_batches_tracked")}


def _detectron2_name(key: str) -> str:
    stage = re.fullmatch(r"layer(\d)\.(.*)", key)
    name = f"res{int(stage[1]) + 1}.{stage[2]}" if stage else f"stem.{key}"
    name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    return re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)


def _projector(state: State) -> State:
    """The official ``encoder.fc`` as ``Projector`` has it: without a bias before the BN at the output.

    The BN of such a bias only shifts its running mean, so taking it off the mean leaves every output as it was.
    """
    if not all(key.split(".")[0].isdigit() for key in state):
        return {}  # a classifier
    last = _last_linear(state)
    if last is None or f"{last}.bias" not in state or f"{last + 1}.running_mean" not in state:
        return state
    state = dict(state)
    state[f"{last + 1}.running_mean"] = state[f"{last + 1}.running_mean"] - state.pop(f"{last}.bias")
    return state


def _last_linear(head: State) -> int | None:
    """The number of the last linear layer among the children of a head."""
    layers = (re.fullmatch(r"(\d{1,4})\.weight", key) for key, value in head.items() if value.ndim == 2)
    return max((int(layer[1]) for layer in layers if layer is not None), default=None)


def _under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}
