"""Export an encoder for other programs: python tools/export_backbone.py CHECKPOINT OUT --format torchvision

CHECKPOINT is a checkpoint of train/pretrain.py or the folder of a run (its newest one), or any other file that
train/linear.py reads: official SimSiam checkpoints, torchvision's and timm's weights, safetensors.

- torchvision: .pth, state_dict of torchvision.models without the classifier
- timm: .pth, the same names, which timm has from torchvision
- detectron2: .pth, {"model", "__author__", "matching_heuristics"} with detectron2's names. Its DetectionCheckpointer
takes it as MODEL.WEIGHTS; unlike the .pkl of its own converters it is read without running code
- official: .pth, {"arch", "state_dict"} as facebookresearch/simsiam writes it, with projector and predictor if
CHECKPOINT has them
- transformers: a folder for Hugging Face's AutoModel and AutoImageProcessor (resnet18 to resnet152)
- onnx: .onnx, images [n, 3, s, s] -> features, any n and s (pip install 'siamstream[onnx]'); compared with the
encoder itself where onnxruntime is installed
- safetensors: .safetensors, torchvision's names, and in the header the architecture and the pixels it expects
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import tempfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
import torchvision
import tyro
from typing_extensions import assert_never

from model.backbone import Stem, build_backbone, find_backbone
from pipeline.common.errors import UserError, exit_on_user_error
from pipeline.common.files import atomic_file, disk_errors
from pipeline.common.locations import InputPath, LocalPath
from train.storage.encoder_files import METADATA, InputSpec, LoadedEncoder, load_backbone, read_weights
from train.storage.encoder_formats import State, to_detectron2, to_official
from train.storage.encoder_layouts import to_transformers
from train.storage.handover import about, plain, transformers_layers, write_transformers_folder

FormatName = Literal["torchvision", "timm", "detectron2", "official", "safetensors", "transformers", "onnx"]
ONNX_TOLERANCE = 1e-4  # largest relative difference of onnxruntime's features


@dataclass(frozen=True)
class ExportConfig:
    """Flags of export_backbone.py."""

    checkpoint: Annotated[InputPath, tyro.conf.Positional]
    """File with an encoder, or the folder of a run."""
    out: Annotated[LocalPath, tyro.conf.Positional]
    """File to write; with --format transformers a folder."""
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
    if weights.channels != 3 and config.format not in ("safetensors", "onnx"):
        raise UserError(
            f"--format {config.format}: its readers take images of 3 channels, and this encoder takes "
            f"{weights.channels}: take --format safetensors or onnx"
        )
    layers = transformers_layers(weights.backbone, weights.stem) if config.format == "transformers" else {}
    if find_backbone(weights.backbone).library == "timm" and config.format == "torchvision":
        raise UserError(f"--format torchvision: {weights.backbone} has timm's layers: take --format timm")
    with disk_errors(f"writing {config.out}", f"cannot write {config.out}", "name another file"):
        config.out.parent.mkdir(parents=True, exist_ok=True)
        if config.format == "transformers":
            state = to_transformers(plain(weights.parts.backbone))
            write_transformers_folder(config.out, state, layers, weights.pixels or InputSpec())
        elif config.format == "onnx":
            write_onnx(config.out, weights)
        else:
            write(config.out, config.format, weights)
    print(f"wrote {config.out}: {weights.describe()}\n{how_to_load(config.out, config.format, weights)}")


def check_out(config: ExportConfig) -> None:
    """Raise UserError for a file that exists, or a name whose suffix belongs to another format."""
    suffix = config.out.suffix
    named = {"safetensors": ".safetensors", "onnx": ".onnx", "transformers": ""}
    ending = named.get(config.format)
    if ending and suffix != ending:
        raise UserError(f"{config.out}: readers know {config.format} by its name, so let OUT end in {ending}")
    if ending is None and suffix not in (".pth", ".pt"):
        raise UserError(f"{config.out}: --format {config.format} writes a file of torch.save, so let OUT end in .pth")
    if config.out.exists() and not config.overwrite:
        raise UserError(f"{config.out} exists: add --overwrite, or name another file")


def write(out: Path, layout: FormatName, weights: LoadedEncoder) -> None:
    """Write the file, whole or not at all. Raises OSError as the disk does."""
    backbone = plain(weights.parts.backbone)
    with atomic_file(out) as file:
        match layout:
            case "torchvision" | "timm":
                torch.save(_described(backbone, weights), file)
            case "detectron2":
                content: dict[str, Any] = {"model": to_detectron2(backbone)}
                torch.save({**content, "__author__": "siamstream", "matching_heuristics": True}, file)
            case "official":
                named = {"arch": weights.backbone, "state_dict": plain(to_official(weights.parts))}
                torch.save({**named, METADATA: about(weights.backbone, weights.stem, weights.pixels)}, file)
            case "safetensors":
                header = {METADATA: json.dumps(about(weights.backbone, weights.stem, weights.pixels)), "format": "pt"}
                file.write(safetensors.torch.save(backbone, header))
            case "transformers" | "onnx":
                raise AssertionError("main() writes these")
            case unreachable:
                assert_never(unreachable)


def write_onnx(out: Path, weights: LoadedEncoder) -> None:
    """Write the network itself, and compare it with ours by onnxruntime. Raises UserError without the packages."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--format onnx needs {', '.join(missing)}: pip install 'siamstream[onnx]'")
    import onnxruntime

    module, _ = build_backbone(weights.backbone, weights.stem, weights.channels)
    load_backbone(module, weights)
    module.eval()
    size = (weights.pixels or InputSpec()).image_size
    images = torch.rand(2, weights.channels, size, size, generator=torch.Generator().manual_seed(0))
    batch = torch.export.Dim("n", min=1)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        file = Path(folder) / out.name
        names: dict[str, Any] = {"input_names": ["images"], "output_names": ["features"]}
        options: dict[str, Any] = {"dynamic_shapes": ({0: batch},), "external_data": False, "verbose": False}
        torch.onnx.export(module, (images,), str(file), dynamo=True, **names, **options)
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        with torch.no_grad():
            ours = module(images)
        theirs = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        difference = float((theirs - ours).abs().max() / ours.abs().max())
        if not difference <= ONNX_TOLERANCE:
            raise UserError(
                f"--format onnx: onnxruntime's features differ by {difference:.1e}, more than {ONNX_TOLERANCE:g}: this "
                f"version of torch ({torch.__version__}) or onnxruntime ({onnxruntime.__version__}) translates the "
                "encoder wrongly; try another"
            )
        os.replace(file, out)


def how_to_load(out: Path, layout: FormatName, weights: LoadedEncoder) -> str:
    """How to load the file in the other program, and the pixels that the encoder expects."""
    pixels = weights.pixels or InputSpec()
    name = weights.backbone
    ours_alone = not hasattr(torchvision.models, name) or weights.stem != "imagenet" or weights.channels != 3
    channels = "" if weights.channels == 3 else f", {weights.channels}"
    build = f"m = torchvision.models.{name}(); m.fc = nn.Identity()"
    if find_backbone(name).library == "timm" and weights.channels == 3:
        ours_alone, name = False, name.removeprefix("timm:")
        build = f'm = timm.create_model("{name}", num_classes=0)'
    elif ours_alone:
        build = f'm, _ = model.backbone.build_backbone("{name}", "{weights.stem}"{channels})'
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
                f"MODEL.WEIGHTS {out} MODEL.PIXEL_MEAN {means} MODEL.PIXEL_STD {stds} INPUT.FORMAT RGB "
                f"{' '.join(detectron2_layers(name))}"
            )
        case "official":
            how = f"python main_lincls.py --arch {name} --pretrained {out}"
        case "transformers":
            how = f'transformers.AutoModel.from_pretrained("{out}")(pixel_values).pooler_output.flatten(1)'
        case "onnx":
            shape = f"float32 [n, {len(pixels.mean)}, s, s]"
            how = f'onnxruntime.InferenceSession("{out}").run(None, {{"images": images}})  # {shape}'
        case "safetensors":
            how = f'{build}; m.load_state_dict(safetensors.torch.load_file("{out}"))'
        case unreachable:
            assert_never(unreachable)
    size = f"{pixels.image_size} px" if weights.pixels else "unknown size"
    kind = "RGB" if len(pixels.mean) == 3 else f"{len(pixels.mean)} channels"
    lines = [f"load it: {how}", f"images: {kind}, trained at {size}, mean {pixels.mean}, std {pixels.std}"]
    if ours_alone:
        lines.append(
            f"note: {name} with the {weights.stem} stem exists here only (model/backbone.py); "
            "others must build the same first layers to load it"
        )
    if layout == "detectron2":
        lines.append(
            "note: to fine-tune as MoCo's and SimSiam's transfers do, train all layers with synchronised batch norm: "
            "MODEL.BACKBONE.FREEZE_AT 0 MODEL.RESNETS.NORM SyncBN MODEL.FPN.NORM SyncBN TEST.PRECISE_BN.ENABLED True"
        )
    if layout == "official" and not weights.parts.projector:
        lines.append("note: there were no projector and predictor to write; its linear evaluation needs none")
    return "\n".join(lines)


def detectron2_layers(name: str) -> list[str]:
    """The settings of detectron2's ResNet that build ``name``: depth, groups, width, channels."""
    depth = re.search(r"\d+", name)
    assert depth is not None
    groups, width = 1, 64
    if grouped := re.fullmatch(r"resnext\d+_(\d+)x(\d+)d", name):
        groups, width = int(grouped[1]), int(grouped[2])
    elif wide := re.fullmatch(r"wide_resnet\d+_(\d+)", name):  # wider inside the blocks, the same outputs
        width = 64 * int(wide[1])
    outputs = 64 if int(depth[0]) < 50 else 256
    values = {"DEPTH": depth[0], "NUM_GROUPS": groups, "WIDTH_PER_GROUP": width, "RES2_OUT_CHANNELS": outputs}
    return [f"MODEL.RESNETS.{key} {value}" for key, value in values.items()] + ["MODEL.RESNETS.STRIDE_IN_1X1 False"]


def _described(backbone: State, weights: LoadedEncoder) -> OrderedDict[str, torch.Tensor]:
    """The state_dict as others load it; what we know of it is an attribute, as torch's own _metadata are."""
    described = OrderedDict(backbone)
    setattr(described, METADATA, about(weights.backbone, weights.stem, weights.pixels))
    return described


if __name__ == "__main__":
    exit_on_user_error(main)
