"""Export an encoder for other programs: python tools/export_backbone.py CHECKPOINT OUT --format torchvision

CHECKPOINT is a checkpoint of train/pretrain.py or the folder of a run (its newest one), or any other file that
train/linear.py reads: official SimSiam checkpoints, torchvision's and timm's weights, safetensors.

- torchvision: .pth, state_dict of torchvision.models without the classifier
- timm: .pth, the same names, which timm has from torchvision
- detectron2: .pth, {"model", "__author__", "matching_heuristics"} with detectron2's names. Its DetectionCheckpointer
takes it as MODEL.WEIGHTS; unlike the .pkl of its own converters it is read without running code
- official: .pth, {"arch", "state_dict"} as facebookresearch/simsiam writes it, with projector and predictor if
CHECKPOINT has them
- safetensors: .safetensors, torchvision's names, and in the header the architecture and the pixels it expects
"""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
import torchvision
import tyro
from typing_extensions import assert_never

from model.backbone import Stem, find_backbone
from pipeline.common.errors import UserError, exit_on_user_error
from pipeline.common.files import atomic_file, disk_errors
from pipeline.common.locations import LocalPath
from train.storage.encoder_files import METADATA, InputSpec, LoadedEncoder, read_weights
from train.storage.encoder_formats import State, to_detectron2, to_official

FormatName = Literal["torchvision", "timm", "detectron2", "official", "safetensors"]


@dataclass(frozen=True)
class ExportConfig:
    """Flags of export_backbone.py."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """File with an encoder, or the folder of a run."""
    out: Annotated[LocalPath, tyro.conf.Positional]
    """File to write."""
    format: FormatName = "torchvision"
    """Format of the file, and with it the names of the weights."""
    backbone: str | None = None
    """Backbone in CHECKPOINT, such as resnet50 (default: detected)."""
    stem: Stem | None = None
    """First layers of the backbone, if their shapes do not show them (default: detected)."""
    overwrite: bool = False
    """Replace OUT if it exists."""


def main() -> None:
    """The command."""
    config = tyro.cli(ExportConfig, description=__doc__)
    check_out(config)
    weights = read_weights(config.checkpoint, config.backbone, config.stem)
    if weights.stem == "default" and config.format in ("detectron2", "official"):
        raise UserError(f"--format {config.format} has names for ResNets only, and this is {weights.backbone}")
    if find_backbone(weights.backbone).library == "timm" and config.format == "torchvision":
        raise UserError(f"--format torchvision: {weights.backbone} has timm's layers: take --format timm")
    with disk_errors(f"writing {config.out}", f"cannot write {config.out}", "name another file"):
        config.out.parent.mkdir(parents=True, exist_ok=True)
        write(config.out, config.format, weights)
    print(f"wrote {config.out}: {weights.describe()}\n{how_to_load(config.out, config.format, weights)}")


def check_out(config: ExportConfig) -> None:
    """Raise UserError for a file that exists, or a name whose suffix belongs to another format."""
    suffix = config.out.suffix
    if config.format == "safetensors" and suffix != ".safetensors":
        raise UserError(f"{config.out}: readers know safetensors by its name, so let OUT end in .safetensors")
    if config.format != "safetensors" and suffix not in (".pth", ".pt"):
        raise UserError(f"{config.out}: --format {config.format} writes a file of torch.save, so let OUT end in .pth")
    if config.out.exists() and not config.overwrite:
        raise UserError(f"{config.out} exists: add --overwrite, or name another file")


def write(out: Path, layout: FormatName, weights: LoadedEncoder) -> None:
    """Write the file, whole or not at all. Raises OSError as the disk does."""
    backbone = _plain(weights.parts.backbone)
    with atomic_file(out) as file:
        match layout:
            case "torchvision" | "timm":
                torch.save(_described(backbone, weights), file)
            case "detectron2":
                content: dict[str, Any] = {"model": to_detectron2(backbone)}
                torch.save({**content, "__author__": "siamstream", "matching_heuristics": True}, file)
            case "official":
                named = {"arch": weights.backbone, "state_dict": _plain(to_official(weights.parts))}
                torch.save({**named, METADATA: _about(weights)}, file)
            case "safetensors":
                file.write(safetensors.torch.save(backbone, {METADATA: json.dumps(_about(weights)), "format": "pt"}))
            case unreachable:
                assert_never(unreachable)


def how_to_load(out: Path, layout: FormatName, weights: LoadedEncoder) -> str:
    """How to load the file in the other program, and the pixels that the encoder expects."""
    pixels = weights.pixels or InputSpec()
    name = weights.backbone
    ours_alone = not hasattr(torchvision.models, name) or weights.stem != "imagenet"
    build = f"m = torchvision.models.{name}(); m.fc = nn.Identity()"
    if find_backbone(name).library == "timm":
        ours_alone, name = False, name.removeprefix("timm:")
        build = f'm = timm.create_model("{name}", num_classes=0)'
    elif ours_alone:
        build = f'm, _ = model.backbone.build_backbone("{name}", "{weights.stem}")'
    match layout:
        case "detectron2" | "official" if ours_alone:
            how = f"with {layout}'s code, once it builds the same layers"
        case "timm" if not ours_alone:
            how = f'timm.create_model("{name}", num_classes=0, checkpoint_path="{out}")'
        case "torchvision" | "timm":
            how = f'{build}; m.load_state_dict(torch.load("{out}"))'
        case "detectron2":
            means, stds = ([round(255 * value, 3) for value in values] for values in (pixels.mean, pixels.std))
            how = (
                f"MODEL.WEIGHTS {out}, MODEL.PIXEL_MEAN {means}, MODEL.PIXEL_STD {stds}, INPUT.FORMAT RGB, "
                "MODEL.RESNETS.STRIDE_IN_1X1 False"
            )
        case "official":
            how = f"python main_lincls.py --arch {name} --pretrained {out}"
        case "safetensors":
            how = f'{build}; m.load_state_dict(safetensors.torch.load_file("{out}"))'
        case unreachable:
            assert_never(unreachable)
    size = f"{pixels.image_size} px" if weights.pixels else "unknown size"
    lines = [f"load it: {how}", f"images: RGB, trained at {size}, mean {pixels.mean}, std {pixels.std}"]
    if ours_alone:
        lines.append(
            f"note: {name} with the {weights.stem} stem exists here only (model/backbone.py); "
            "others must build the same first layers to load it"
        )
    if layout == "official" and not weights.parts.projector:
        lines.append("note: there were no projector and predictor to write; its linear evaluation needs none")
    return "\n".join(lines)


def _plain(state: State) -> State:
    """Copies in contiguous layout: other programs do not expect channels-last."""
    return {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in state.items()}


def _described(backbone: State, weights: LoadedEncoder) -> OrderedDict[str, torch.Tensor]:
    """The state_dict as others load it; what we know of it is an attribute, as torch's own _metadata are."""
    described = OrderedDict(backbone)
    setattr(described, METADATA, _about(weights))
    return described


def _about(weights: LoadedEncoder) -> dict[str, Any]:
    """The part of a run's configuration that ``read_weights`` reads."""
    about: dict[str, Any] = {"model": {"backbone": weights.backbone, "stem": weights.stem}}
    return {**about, "views": asdict(weights.pixels)} if weights.pixels else about


if __name__ == "__main__":
    exit_on_user_error(main)
