"""A backbone with a linear classifier on top: built from an encoder, saved so that timm and tools/predict.py load it.

A classifier's folder holds model.safetensors and config.json as timm.create_model("local-dir:FOLDER") reads them, where
timm knows the backbone; our own name of it stands beside that in config.json.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from jaxtyping import Float
from torch import Tensor, nn

from model.backbone import build_backbone
from pipeline.common.errors import UserError
from pipeline.common.files import atomic_file, check_regular, disk_errors, read_object, write_json
from train.storage.encoder_files import METADATA, InputSpec

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"


class Classifier(nn.Module):
    """``[n, 3, h, w] -> [n, classes]``: logits."""

    def __init__(self, backbone: nn.Module, width: int, classes: int, seed: int) -> None:
        """``backbone`` gives ``[n, width]``. The head starts at zero: the first loss is ln(classes) for any encoder."""
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(width, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        """The head is computed in float32."""
        features = self.backbone(x)
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.float())


@dataclass(frozen=True)
class LoadedClassifier:
    """A classifier from a folder, on the CPU and in evaluation mode."""

    model: Classifier
    pixels: InputSpec
    classes: tuple[str, ...]


def save_classifier(
    folder: Path, model: Classifier, backbone: str, stem: str, pixels: InputSpec, classes: tuple[str, ...]
) -> bool:
    """Write the folder; returns whether timm can load it. Raises UserError for a full disk."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.backbone.state_dict().items()}
    head = _timm_head(backbone, stem, len(classes), state)
    state |= {f"{head or 'head'}.{name}": value.detach().cpu() for name, value in model.head.state_dict().items()}
    about = {
        "architecture": backbone if head else None,
        "num_classes": len(classes),
        "num_features": model.head.in_features,
        "label_names": list(classes),
        "pretrained_cfg": {
            "num_classes": len(classes),
            "input_size": [len(pixels.mean), pixels.image_size, pixels.image_size],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": 0.875,
            "mean": list(pixels.mean),
            "std": list(pixels.std),
            "classifier": head,
        },
        METADATA: {"backbone": backbone, "stem": stem, "head": head or "head", "views": asdict(pixels)},
    }
    with disk_errors(f"writing {folder}", f"{folder} cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / WEIGHTS_FILE) as file:
            file.write(safetensors.torch.save(state, {"format": "pt"}))
        write_json(folder / CONFIG_FILE, about)
    return head is not None


def _timm_head(backbone: str, stem: str, classes: int, state: dict[str, Tensor]) -> str | None:
    """timm's name of the classifier where its architecture ``backbone`` has exactly these weights beside it."""
    name = backbone.removeprefix("timm:")
    if not timm.is_model(name):
        return None
    with torch.device("meta"):
        there = timm.create_model(name, num_classes=classes)
    head: Any = timm.get_pretrained_cfg_value(name, "classifier")
    if not isinstance(head, str):
        return None
    shapes = {key: value.shape for key, value in there.state_dict().items() if not key.startswith(f"{head}.")}
    return head if shapes == {key: value.shape for key, value in state.items()} else None


def load_classifier(folder: Path) -> LoadedClassifier:
    """Read a folder that ``save_classifier`` wrote, or the run folder with one. Raises UserError if it is none."""
    folder = folder / "classifier" if (folder / "classifier").is_dir() else folder
    try:
        about = read_object(folder / CONFIG_FILE)
        ours = about[METADATA]
        check_regular(folder / WEIGHTS_FILE)
        state = safetensors.torch.load_file(folder / WEIGHTS_FILE)
        pixels = InputSpec(ours["views"]["image_size"], tuple(ours["views"]["mean"]), tuple(ours["views"]["std"]))
        classes = tuple(about["label_names"])
        backbone, width = build_backbone(ours["backbone"], ours["stem"], len(pixels.mean))
        model = Classifier(backbone, width, len(classes), seed=0)
        head = {key: state.pop(f"{ours['head']}.{key}") for key in ("weight", "bias")}
        model.backbone.load_state_dict(state)
        model.head.load_state_dict(head)
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} holds no classifier ({Path(str(error.filename)).name} is missing): give the --run-dir of "
            "train/finetune.py"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        raise UserError(f"{folder} is no classifier of train/finetune.py, or a damaged one: {error}") from error
    return LoadedClassifier(model.eval(), pixels, classes)
