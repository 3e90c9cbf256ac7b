"""An encoder from a file for use in Python: a module, and the preprocessing of the images that it expects.

    module, preprocess = siamstream.load_encoder("runs/photos")
    with torch.no_grad():
        feature = module(preprocess("cat.jpg")[None])  # [1, d]

The preprocessing makes the same pixels as evaluation does: the shorter side resized, the centre cut out, normalised
with the mean and std of training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from PIL import Image
from torch import Tensor, nn

from model.backbone import Stem
from pipeline.backends import reference
from pipeline.common.errors import UserError
from pipeline.common.files import read_regular
from pipeline.common.locations import expanded
from pipeline.dataset.dataset import ShardSet
from pipeline.loader.config import LoaderConfig
from pipeline.loader.loader import open_dataset
from pipeline.sampling.views import ViewRecipe, centre_crops
from train.distributed.process_group import DistContext, choose_device
from train.evaluation.features import EncoderConfig, ImageSource, open_frozen
from train.evaluation.features import extract_features as extract_part
from train.optimization.precision import choose_precision


@dataclass(frozen=True)
class Preprocess:
    """An image as the encoder expects it. Can be pickled, and so used in a DataLoader's workers."""

    recipe: ViewRecipe  # its image_size (px), mean and std count

    def __call__(self, image: Image.Image | str | Path) -> Float32[Tensor, "c s s"]:
        """The centre of an image, resized and normalised, float32. EXIF orientation is ignored, as in training.

        Raises UserError if a file cannot be read as an image.
        """
        pixels = decode_file(Path(expanded(str(image)))) if isinstance(image, str | Path) else _pixels(image)
        if len(pixels) != self.recipe.channels:
            raise UserError(
                f"the image has {len(pixels)} channels, and the encoder takes {self.recipe.channels}: give a .npy file "
                "as make_shards --channels takes them"
            )
        crops = centre_crops(self.recipe.image_size, np.array([pixels.shape[1:]], np.int32))
        return reference.normalise(reference.centre_crop(pixels, crops, 0, self.recipe.image_size), self.recipe)


def decode_file(path: Path) -> Tensor:
    """The pixels of an image file, uint8 ``[3, h, w]``. Raises UserError if it cannot be read as one."""
    try:
        return reference.decode(read_regular(path))
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from error


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


class Encoder(NamedTuple):
    """What `load_encoder` returns."""

    module: nn.Module  # images [n, 3, s, s] -> features [n, d]; in evaluation mode, on the CPU
    preprocess: Preprocess


def load_encoder(
    checkpoint: str | Path, *, backbone: str | None = None, stem: Stem | None = None, image_size: int | None = None
) -> Encoder:
    """Read the backbone of a checkpoint, of a run's folder (its newest one) or of any file that linear.py reads.

    ``backbone`` and ``stem`` say what it is where the file leaves that open; ``image_size`` (px) where another one
    than in training is wanted. Raises UserError if there is no encoder, or another one.
    """
    config = EncoderConfig(expanded(str(checkpoint)), backbone, stem, image_size)
    frozen = open_frozen(config, torch.device("cpu"))
    return Encoder(frozen.backbone, Preprocess(frozen.recipe))


def extract_features(
    module: nn.Module,
    preprocess: Preprocess,
    dataset: ShardSet | str | Path,
    ids: Int64[np.ndarray, " n"] | None = None,
    *,
    device: Literal["auto", "cuda", "cpu"] = "auto",
    loader: LoaderConfig = LoaderConfig(),  # noqa: B008  # frozen
) -> Float[Tensor, "n d"]:
    """Features of the samples ``ids`` of a dataset in their order (default: of all), float32 on the CPU.

    ``dataset`` is an open one, a folder or a URL. The module moves to the device. Raises UserError for an image that
    cannot be read. One process; `siamstream embed` spreads the work and writes files.
    """
    opened = dataset if isinstance(dataset, ShardSet) else open_dataset(dataset, loader)
    target = choose_device(device)
    precision = choose_precision("auto", target)
    source = ImageSource(preprocess.recipe, loader, DistContext.alone(target), precision.autocast, precision.view_dtype)
    module = module.to(device=target, memory_format=torch.channels_last)  # type: ignore[call-overload]
    chosen = np.arange(opened.num_samples) if ids is None else np.asarray(ids, np.int64)
    return extract_part(module, opened, chosen, source).cpu()
