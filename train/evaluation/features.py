"""Features of images by a frozen backbone, each sample exactly once over all ranks, with their labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as td
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from model.backbone import Stem
from pipeline.common.errors import UserError, check_seed
from pipeline.common.flags import own_flags
from pipeline.common.locations import PathText, Url
from pipeline.dataset.dataset import BadSampleError, ShardSet
from pipeline.loader.config import LoaderConfig
from pipeline.loader.loader import open_dataset, open_images
from pipeline.sampling.views import ViewRecipe
from pipeline.sharding.index_cache import with_index
from train.distributed.collectives import any_rank, on_all_ranks
from train.distributed.process_group import DistContext
from train.storage.encoder_files import InputSpec, LoadedEncoder, open_encoder

IMAGES_PER_PASS = 256
NOT_SEEN = -1  # label of an image that could not be read


@own_flags
@dataclass(frozen=True)
class EncoderConfig:
    """Which encoder is evaluated."""

    # Encoder to take: a run folder (its newest checkpoint), a checkpoint of train/pretrain.py or of the official
    # SimSiam, weights of torchvision or timm, .safetensors, or untrained:BACKBONE.
    checkpoint: PathText
    # Backbone that the checkpoint holds, where it does not say; default: found out.
    backbone: str | None = None
    # First layers of it, where their shape leaves it open; default: found out.
    stem: Stem | None = None
    # Side of the images in pixels; default: as in training if the checkpoint says so, else 224.
    image_size: int | None = None
    # Seed of untrained weights, and of all that is drawn.
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.image_size is not None:
            ViewRecipe(image_size=self.image_size)


@dataclass(frozen=True)
class FrozenEncoder:
    """An encoder to evaluate: in evaluation mode, without gradients, on its device."""

    backbone: nn.Module
    width: int  # of its features
    pixels: InputSpec
    weights: LoadedEncoder

    @property
    def recipe(self) -> ViewRecipe:
        """The size and normalisation of images that it expects, otherwise untouched."""
        return self.pixels.recipe


def open_frozen(config: EncoderConfig, device: torch.device) -> FrozenEncoder:
    """Read the encoder. Raises UserError if there is none in the file, or another one than said."""
    backbone, width, weights = open_encoder(config.checkpoint, config.backbone, config.stem, config.seed)
    pixels = weights.pixels or InputSpec()
    if config.image_size is not None:
        pixels = replace(pixels, image_size=config.image_size)
    backbone = backbone.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    frozen = FrozenEncoder(backbone, width, pixels, weights)
    _ = frozen.recipe  # a size or colours that cannot be raise before any data is opened
    return frozen


@dataclass(frozen=True)
class Samples:
    """Some samples of a dataset."""

    dataset: ShardSet
    ids: Int64[np.ndarray, " n"]

    @classmethod
    def all_of(cls, dataset: ShardSet) -> Samples:
        """Every sample, in the order of the shards."""
        return cls(dataset, np.arange(dataset.num_samples))

    @classmethod
    def labelled(cls, dataset: ShardSet) -> Samples:
        """Every sample that has a label, in the order of the shards."""
        if dataset.has_labels:
            return cls.all_of(dataset)
        ids = np.arange(dataset.num_samples if dataset.classes else 0)
        return cls(dataset, ids[dataset.labels(ids) >= 0])

    @classmethod
    def sorted(cls, dataset: ShardSet, ids: Int64[np.ndarray, " n"]) -> Samples:
        """Samples ``ids`` in the order of the shards, so that one is read after the other."""
        return cls(dataset, np.sort(ids))


@dataclass(frozen=True)
class ImageSource:
    """How features are made: from which images, through which loader, on how many ranks, in which number format."""

    recipe: ViewRecipe
    loader: LoaderConfig
    dist: DistContext
    autocast: Callable[[], AbstractContextManager[object]]
    dtype: torch.dtype  # of the images
    asked_to_stop: Callable[[], bool] = lambda: False  # looked at between batches; true ends them with Abandoned


class Abandoned(Exception):
    """The features are not made, since a process was asked to stop. ``labelled_features`` raises it on every rank."""


def refuse_bad_sample(error: BadSampleError) -> None:
    """An image that cannot be read ends an evaluation: counted with another's pixels it would be silently wrong."""
    raise UserError(
        f"{error}\nAn accuracy counts every image once, so none may be left out or replaced: copy the dataset again "
        "from where it came from, or write it again without this image"
    )


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    dataset: ShardSet,
    ids: Int64[np.ndarray, " n"],
    source: ImageSource,
    *,
    dtype: torch.dtype = torch.float32,
    on_bad_sample: Callable[[BadSampleError], None] = refuse_bad_sample,
) -> Float[Tensor, "part d"]:
    """This rank's part of the features of samples ``ids``: rows ``split_ids(...)``, in ``dtype``, on its device.

    The backbone computes in evaluation mode and is given back in the mode it came in. An image that cannot be read
    goes to ``on_bad_sample``; if that returns, the row holds another image's features. Raises Abandoned. Contains no
    collective.
    """
    dist = source.dist
    mine = split_ids(ids, dist.world_size)[dist.rank]
    features, filled = torch.empty(0), 0
    with (
        _evaluating(backbone),
        open_images(
            dataset,
            source.recipe,
            source.loader,
            dist,
            ids=mine if len(mine) else ids[:1],  # a rank without images still learns how wide features are
            batch=IMAGES_PER_PASS,
            dtype=source.dtype,
            on_bad_sample=on_bad_sample,
        ) as batches,
    ):
        for x, _ in batches:
            dist.status.work(f"features of images, {filled:,} of {len(mine):,} done")
            if source.asked_to_stop():
                raise Abandoned
            with source.autocast():
                part = backbone(x)
            if filled == 0:
                features = torch.empty((max(len(mine), 1), part.shape[1]), dtype=dtype, device=part.device)
            features[filled : filled + len(part)] = part
            filled += len(part)
    return features[: len(mine)]


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def labelled_features(
    backbone: nn.Module,
    samples: Samples,
    source: ImageSource,
    *,
    dtype: torch.dtype = torch.float32,
    tolerant: bool = False,
) -> tuple[Float[Tensor, "part d"], Int64[Tensor, " part"]]:
    """This rank's features with their labels.

    An image that cannot be read raises SharedError; if ``tolerant`` it is warned of and labelled NOT_SEEN instead.
    Raises Abandoned if any rank is asked to stop. A collective.
    """
    dist, bad = source.dist, set[int]()

    def note(error: BadSampleError) -> None:
        if error.sample_id not in bad:
            print(f"bad sample, left out of the accuracy: {error}", flush=True)
        bad.add(error.sample_id)

    def extract() -> Float[Tensor, "part d"] | None:
        on_bad_sample = note if tolerant else refuse_bad_sample
        try:
            return extract_features(
                backbone, samples.dataset, samples.ids, source, dtype=dtype, on_bad_sample=on_bad_sample
            )
        except Abandoned:
            return None

    features = on_all_ranks(dist, extract)
    (abandoned,) = any_rank(dist, features is None)
    if features is None or abandoned:
        raise Abandoned
    mine = split_ids(samples.ids, dist.world_size)[dist.rank]
    labels = samples.dataset.labels(mine).astype(np.int64)
    labels[np.isin(mine, list(bad))] = NOT_SEEN
    broken = ~features.isfinite().all(dim=1)
    if tolerant:  # a run in training: its own guard says what is wrong with it
        labels[broken.cpu().numpy()] = NOT_SEEN
        features[broken] = 0
    else:
        on_all_ranks(dist, lambda: check_finite(int(broken.sum()), len(broken)))
    return features, torch.from_numpy(labels).to(dist.device)


def check_finite(broken: int, images: int) -> None:
    """Raise UserError if features are nan or inf: what is computed from them would look like an accuracy."""
    if broken:
        raise UserError(
            f"features of {broken:,} of {images:,} images are nan or inf, so the encoder is broken, or its numbers do "
            "not fit the format: try --precision fp32, or an earlier checkpoint"
        )


def split_ids(ids: Int64[np.ndarray, " n"], parts: int) -> list[Int64[np.ndarray, " part"]]:
    """Contiguous parts that differ by at most one in length; together they are ``ids``, none doubled or dropped."""
    return np.array_split(ids, parts)


def each_rank(
    dist: DistContext,
    rows: Shaped[Tensor, "n *rest"],  # noqa: F821
    counts: list[int],
) -> Iterator[Shaped[Tensor, "count *rest"]]:  # noqa: F821
    """Every rank's rows in turn, on every rank; only one rank's are held beside one's own. A collective."""
    assert len(rows) == counts[dist.rank]
    for rank, count in enumerate(counts):
        part = rows if rank == dist.rank else rows.new_empty((count, *rows.shape[1:]))
        if dist.world_size > 1 and count > 0:
            td.broadcast(part, src=rank)
        yield part


def open_indexed(place: Path | Url, loader: LoaderConfig) -> ShardSet:
    """The dataset at ``place``; tars of others through their index. Raises UserError as ``with_index`` does."""
    return open_dataset(with_index(place, loader.cache), loader)


def open_labelled(path: Path | Url, flag: str, loader: LoaderConfig) -> ShardSet:
    """Open a dataset of which some samples at least have labels. Raises UserError otherwise."""
    dataset = open_indexed(path, loader)
    if not dataset.has_labels and len(Samples.labelled(dataset).ids) == 0:
        raise UserError(f"{flag} {path} has no labels: shard it from class folders, or with a label file (--labels)")
    return dataset


def check_same_classes(flag: str, dataset: ShardSet, train: ShardSet) -> None:
    """Raise UserError unless ``dataset``, given by ``flag``, numbers the same classes alike."""
    if dataset.classes == train.classes:
        return
    only = {
        "there": sorted(set(dataset.classes) - set(train.classes)),
        "in --data": sorted(set(train.classes) - set(dataset.classes)),
    }
    told = [f"only {where} {len(names)}, {', '.join(names[:5])}" for where, names in only.items() if names]
    raise UserError(
        f"{flag} {dataset.path} has other classes than --data {train.path} "
        f"({'; '.join(told) or 'the same names, but numbered in another order'}): shard it with --classes-from "
        f"{train.path}"
    )
