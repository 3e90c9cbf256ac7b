"""Find a ResNet among the names of other projects' checkpoints. Pure: names and tensors in, names and tensors out.

A ResNet is recognised by the names of its first and later layers below any prefix, so a checkpoint of a project that is
not known here is read too. Three ways to name a ResNet's layers are known:

- torchvision's, which timm, MoCo (``encoder_q.``), MoCo v3 (``base_encoder.``), BYOL, DINO (``teacher.backbone.``) and
  solo-learn (``backbone.``) use: ``conv1``, ``bn1``, ``layer1.0.conv1``, ...; heads may stand beside them, as SwAV's do
- numbers, as in ``nn.Sequential(*resnet.children())``: lightly, some versions of BYOL
- Hugging Face transformers': ``embedder.embedder.convolution``, ``encoder.stages.0.layers.0.layer.0.convolution``, ...
"""

from __future__ import annotations

import re

from torch import Tensor

State = dict[str, Tensor]
# Parts of a prefix that mark a copy of the trained encoder. DINO evaluates the teacher, the others the trained encoder.
COPIES = re.compile(r"momentum|target|ema\b|encoder_k|key_encoder|student", re.IGNORECASE)
# What others put beside a ResNet's layers: SwAV's projection_head and prototypes, a classifier, ...
HEADS = re.compile(r"(fc|heads?|linear|mlp|classifier|(project|predict)(ion|or)?(_?(head|mlp))?|prototypes?)\.")
FEW = 3  # names that a summary lists in full
_HF_BLOCK = re.compile(
    r"encoder\.stages\.(\d{1,4})\.layers\.(\d{1,4})\.(layer\.(\d{1,4})|shortcut)\.(convolution|normalization)\.(.+)"
)


def find_resnets(flat: State) -> list[str]:
    """The prefixes below which a ResNet lies, such as ``encoder_q.``; without copies if there is an original."""
    found = {key.removesuffix("layer1.0.conv1.weight") for key in flat if key.endswith("layer1.0.conv1.weight")}
    found |= {match[1] for key in flat if (match := re.fullmatch(r"(|.*\.)\d+\.0\.conv1\.weight", key))}
    first = "embedder.embedder.convolution.weight"
    found |= {key.removesuffix(first) for key in flat if key.endswith(first)}
    whole = sorted(prefix for prefix in found if torchvision_names(below(flat, prefix)) is not None)
    originals = [prefix for prefix in whole if not COPIES.search(prefix)]
    return originals or whole


def torchvision_names(state: State) -> State | None:
    """A ResNet's weights by torchvision's names, without a classifier; None if it is none of the three layouts."""
    if "conv1.weight" in state and "layer1.0.conv1.weight" in state:
        return without_heads(state)
    if "0.weight" in state and "1.running_mean" in state:
        return _from_numbers(state)
    if "embedder.embedder.convolution.weight" in state:
        return _from_transformers(state)
    return None


def without_heads(state: State) -> State:
    """A ResNet's weights without a classifier and the heads of methods beside them."""
    return {key: value for key, value in state.items() if not HEADS.match(key)}


def to_transformers(backbone: State) -> State:
    """torchvision's names to those of transformers' ``ResNetModel``."""
    return {_transformers_name(key): value for key, value in backbone.items()}


def summary(flat: State, most: int = 6) -> str:
    """What a file holds, by the beginnings of the names: ``encoder. (62 tensors), queue (1)``."""
    if len(flat) <= FEW:
        return ", ".join(flat)
    counts: dict[str, int] = {}
    for key in flat:
        parts = key.split(".")
        start = ".".join(parts[: 2 if len(parts) > 2 else 1]) + ("." if len(parts) > 1 else "")
        counts[start] = counts.get(start, 0) + 1
    shown = [f"{start} ({count} tensor{'s' if count > 1 else ''})" for start, count in list(counts.items())[:most]]
    return ", ".join(shown) + (f" and {len(counts) - most} other groups" if len(counts) > most else "")


def below(state: State, prefix: str) -> State:
    """The entries below ``prefix``, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _from_numbers(state: State) -> State | None:
    stages = sorted({int(match[1]) for key in state if (match := re.match(r"(\d{1,4})\.0\.conv1\.weight$", key))})
    if len(stages) != 4:
        return None
    names = {"0": "conv1", "1": "bn1", **{str(number): f"layer{place}" for place, number in enumerate(stages, 1)}}
    found = {}
    for key, value in state.items():
        number, _, rest = key.partition(".")
        if number in names:
            found[f"{names[number]}.{rest}".replace(".shortcut.", ".downsample.")] = value
    return found


def _from_transformers(state: State) -> State:
    found = {}
    for key, value in state.items():
        first = re.fullmatch(r"embedder\.embedder\.(convolution|normalization)\.(.+)", key)
        block = _HF_BLOCK.fullmatch(key)
        if first:
            found[f"{'conv1' if first[1] == 'convolution' else 'bn1'}.{first[2]}"] = value
        elif block:
            stage, number, _, layer, kind, rest = block.groups()
            where = f"layer{int(stage) + 1}.{number}"
            if layer is None:
                found[f"{where}.downsample.{0 if kind == 'convolution' else 1}.{rest}"] = value
            else:
                found[f"{where}.{'conv' if kind == 'convolution' else 'bn'}{int(layer) + 1}.{rest}"] = value
    return found


def _transformers_name(key: str) -> str:
    kinds = {"conv": "convolution", "bn": "normalization"}
    if first := re.fullmatch(r"(conv|bn)1\.(.+)", key):
        return f"embedder.embedder.{kinds[first[1]]}.{first[2]}"
    if inner := re.fullmatch(r"layer(\d)\.(\d+)\.(conv|bn)(\d)\.(.+)", key):
        stage, number, kind, layer, rest = inner.groups()
        return f"encoder.stages.{int(stage) - 1}.layers.{number}.layer.{int(layer) - 1}.{kinds[kind]}.{rest}"
    shortcut = re.fullmatch(r"layer(\d)\.(\d+)\.downsample\.([01])\.(.+)", key)
    assert shortcut is not None, f"{key} is no name of a torchvision ResNet"
    stage, number, part, rest = shortcut.groups()
    kind = "convolution" if part == "0" else "normalization"
    return f"encoder.stages.{int(stage) - 1}.layers.{number}.shortcut.{kind}.{rest}"
