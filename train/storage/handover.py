"""What a finished run leaves for other programs: its backbone as safetensors, and a folder that timm loads.

RUN/backbone.safetensors holds torchvision's or timm's names and, in its header, the architecture and the pixels that it
expects. RUN/timm is there where timm builds the same layers:
``timm.create_model("local-dir:RUN/timm", pretrained=True)`` gives the encoder,
and ``timm.data.resolve_model_data_config`` its preprocessing.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import nn

from model.backbone import Stem, find_backbone
from pipeline.common.errors import UserError
from pipeline.common.files import atomic_file, disk_errors, write_json
from pipeline.sampling.views import SMALL_VIEW
from train.storage.encoder_files import METADATA, InputSpec
from train.storage.encoder_layouts import State

BACKBONE_FILE, TIMM_FOLDER = "backbone.safetensors", "timm"


def hand_over(run_dir: Path, backbone: nn.Module, name: str, stem: Stem, pixels: InputSpec) -> str:
    """Write both into a run's folder; returns how to load them, for people. Raises UserError for a full disk.

    ``name`` and ``stem`` are those that the backbone was built with.
    """
    state = plain(dict(backbone.state_dict()))
    file, folder = run_dir / BACKBONE_FILE, run_dir / TIMM_FOLDER
    with disk_errors(f"writing {run_dir}", f"{run_dir} cannot be written"):
        write_safetensors(file, state, name, stem, pixels)
        architecture = timm_architecture(state, name)
        shutil.rmtree(folder, ignore_errors=True)  # of a former end of this run
        if architecture is not None:
            write_timm_folder(folder, file, architecture, pixels)
    lines = [f"encoder      {file}", f"  module, preprocess = siamstream.load_encoder({str(run_dir)!r})"]
    if architecture is not None:
        lines += [
            f"  module = timm.create_model({f'local-dir:{folder}'!r}, pretrained=True)",
            "  preprocess = timm.data.create_transform(**timm.data.resolve_model_data_config(module))",
        ]
    return "\n".join(lines)


def plain(state: State) -> State:
    """Copies on the CPU in contiguous layout: other programs do not expect channels-last."""
    return {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}


def about(name: str, stem: Stem, pixels: InputSpec | None) -> dict[str, Any]:
    """The part of a run's configuration that ``read_weights`` reads."""
    described: dict[str, Any] = {"model": {"backbone": name, "stem": stem}}
    return {**described, "views": asdict(pixels)} if pixels else described


def write_safetensors(path: Path, state: State, name: str, stem: Stem, pixels: InputSpec | None) -> None:
    """Write weights with what ``read_weights`` needs to know of them. Raises OSError as the disk does."""
    header = {METADATA: json.dumps(about(name, stem, pixels)), "format": "pt"}
    with atomic_file(path) as file:
        file.write(safetensors.torch.save(state, header))


def timm_architecture(state: State, name: str) -> str | None:
    """timm's architecture that has exactly these weights; None where it has none."""
    model = name.removeprefix("timm:")
    if not timm.is_model(model) or find_backbone(name).library == "own":
        return None
    with torch.device("meta"):
        there = timm.create_model(model, num_classes=0).state_dict()
    same = {key: value.shape for key, value in there.items()} == {key: value.shape for key, value in state.items()}
    return model if same else None


def write_timm_folder(folder: Path, weights: Path, architecture: str, pixels: InputSpec) -> None:
    """Write config.json as timm's local-dir has it, and ``weights`` beside it. Raises OSError as the disk does."""
    size = pixels.image_size
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [len(pixels.mean), size, size],
            "fixed_input_size": False,
            "interpolation": "bilinear",  # as evaluation resizes; antialiased
            "crop_pct": 1.0 if size <= SMALL_VIEW else 0.875,
            "mean": list(pixels.mean),
            "std": list(pixels.std),
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    try:
        os.link(weights, folder / "model.safetensors")  # the same file: no room is taken twice
    except OSError:  # a file system without links
        shutil.copyfile(weights, folder / "model.safetensors")
    write_json(folder / "config.json", config)


def write_transformers_folder(folder: Path, state: State, layers: dict[str, Any], pixels: InputSpec) -> None:
    """Write a folder for transformers' ``AutoModel`` and ``AutoImageProcessor``. Raises OSError as the disk does.

    ``layers`` are the fields of transformers' ResNetConfig that say what the backbone is built of.
    """
    size = pixels.image_size
    processor = {
        "image_processor_type": "ConvNextImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "crop_pct": 1.0 if size <= SMALL_VIEW else 0.875,
        "resample": 2,  # PIL's bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
    }
    config = {"architectures": ["ResNetModel"], "model_type": "resnet", "torch_dtype": "float32", **layers}
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / "model.safetensors") as file:
        file.write(safetensors.torch.save(state, {"format": "pt"}))
    write_json(folder / "preprocessor_config.json", processor)
    write_json(folder / "config.json", config)


def transformers_layers(name: str, stem: Stem) -> dict[str, Any]:
    """The fields of transformers' ResNetConfig for a backbone. Raises UserError for one that transformers lacks."""
    depths = {
        "resnet18": ("basic", [2, 2, 2, 2], [64, 128, 256, 512]),
        "resnet34": ("basic", [3, 4, 6, 3], [64, 128, 256, 512]),
        "resnet50": ("bottleneck", [3, 4, 6, 3], [256, 512, 1024, 2048]),
        "resnet101": ("bottleneck", [3, 4, 23, 3], [256, 512, 1024, 2048]),
        "resnet152": ("bottleneck", [3, 8, 36, 3], [256, 512, 1024, 2048]),
    }
    if name not in depths or stem != "imagenet":
        raise UserError(
            f"--format transformers: it has no {name} with the {stem} stem, only {', '.join(depths)} with the imagenet "
            "stem: take --format safetensors"
        )
    layer_type, depth, widths = depths[name]
    return {
        "layer_type": layer_type,
        "depths": depth,
        "hidden_sizes": widths,
        "embedding_size": 64,
        "num_channels": 3,
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
    }
