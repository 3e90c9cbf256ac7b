"""Write the features of every image of a dataset: one row a sample, in the dataset's order, with its name.

    python tools/embed.py runs/photos data/photos photos-embeddings
    torchrun --standalone --nproc-per-node=8 tools/embed.py runs/imagenet data/imagenet-train embeddings --dtype float16
    python tools/embed.py untrained:resnet50 data/photos out --format parquet --normalise

CHECKPOINT is anything that train/linear.py reads. Interrupted and started again, it goes on with what is missing; the
numbers do not depend on the number of processes. An image that cannot be read gets a row of nan and is listed in
_embeddings.json.
"""

from __future__ import annotations

import train.openmp  # noqa: F401  # before torch

# isort: split
import atexit
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from typing_extensions import assert_never

from pipeline.common.engine import EngineConfig, describe_rates, ray_engine
from pipeline.common.errors import UserError, exit_on_user_error
from pipeline.common.flags import group
from pipeline.common.locations import DatasetPlace, LocalPath, PathText
from pipeline.common.system import duration, progress
from pipeline.dataset.dataset import BadSampleError, ShardSet
from pipeline.loader.config import LoaderConfig
from pipeline.loader.loader import open_images
from pipeline.sharding.index_cache import make_indexes
from tools.embedding.store import BLOCK, UNFINISHED, Block, EmbeddingWriter, Format
from train.distributed.collectives import on_all_ranks, on_rank0, print0
from train.distributed.process_group import DistContext, distributed, exit_once
from train.evaluation.features import IMAGES_PER_PASS, EncoderConfig, FrozenEncoder, open_frozen, open_indexed
from train.optimization.precision import Precision, PrecisionName, choose_precision

BLOCKS_AT_ONCE = 64  # a rank's loader is opened for a million images at a time: the list of ids stays small
assert BLOCK % IMAGES_PER_PASS == 0


@dataclass(frozen=True)
class EmbedConfig:
    """Write the features of every image of a dataset."""

    checkpoint: Annotated[PathText, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A run folder, a checkpoint, weights of torchvision or timm, .safetensors, or untrained:BACKBONE."""
    data: Annotated[DatasetPlace, tyro.conf.Positional]
    """The dataset to embed."""
    out: Annotated[LocalPath, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The folder to write."""
    format: Format = "npy"
    """Kind of files to write. npy: one array and a list of names. parquet: columns id, name, label, vector (needs
    pyarrow: pip install 'siamstream[parquet]'). webdataset: tars of KEY.npy and KEY.json."""
    features: Literal["backbone", "projector"] = "backbone"
    """Output of the encoder to write. backbone: what linear.py and knn.py judge, for search and classification.
    projector: what the loss sees."""
    dtype: Literal["float16", "float32"] = "float32"
    """Number format of the written vectors; float16 takes half the disk."""
    normalise: bool = False
    """Scale every vector to length 1."""
    overwrite: bool = False
    """Delete the embeddings in OUT and write them again."""
    backbone: str | None = None
    """Backbone that the checkpoint holds, where it does not say; default: found out."""
    image_size: int | None = None
    """Side of the images in pixels; default: as in training if the checkpoint says so, else 224."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device that computes; auto: the GPUs if there are any."""
    precision: PrecisionName = "auto"
    """Number format of the forward pass; auto: bf16 on a GPU (fp16 before Ampere), fp32 on a CPU."""
    loader: Annotated[LoaderConfig, group("loader")] = field(default_factory=LoaderConfig)
    engine: Annotated[EngineConfig, group("engine")] = field(default_factory=EngineConfig)


def main() -> None:
    """Parse the command line and embed."""
    config = tyro.cli(EmbedConfig, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        match config.engine.engine:
            case "local":
                make_indexes(config.loader.cache, config.data)
                with exit_once(), distributed(config.device) as dist:
                    embed(config, dist)
            case "ray":
                embed_on_ray(config)
            case other:
                assert_never(other)
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command goes on with what is missing in {config.out}", file=sys.stderr)
        sys.exit(130)  # the shell's code for Ctrl-C


def embed(config: EmbedConfig, dist: DistContext) -> None:
    """Write the folder. Raises SharedError for a user's mistake on any rank. A collective."""
    opened = on_all_ranks(dist, lambda: _open_all(config, dist))
    dataset, encoder, precision = opened.dataset, opened.encoder, opened.precision
    head, writer = opened.head, opened.writer
    width = opened.about.width
    with ExitStack() as held:
        if not on_rank0(dist, lambda: writer.start(config.overwrite, held)):
            print0(dist, f"{config.out} is complete already; --overwrite writes it again")
            return
        print0(
            dist,
            f"encoder      {encoder.weights.describe()}, images of {encoder.recipe.image_size} px, {precision.name}",
        )
        missing = on_rank0(dist, writer.missing)
        if len(missing) < writer.blocks:
            print0(dist, f"going on: {writer.blocks - len(missing)} of {writer.blocks} blocks are there")
        job = _Job(config, dataset, encoder, head, precision, dist, writer)
        seconds = on_all_ranks(dist, lambda: _embed_blocks(job, missing))
        bad = on_rank0(dist, lambda: writer.finish(_record(config, opened.about)))
        print0(dist, f"{config.out}: {dataset.num_samples:,} x {width} {config.dtype} in {duration(seconds)}")
        if bad:
            print0(dist, _BAD.format(len(bad)))


_BAD = "{} images could not be read and have rows of nan: bad_samples in _embeddings.json"


def _record(config: EmbedConfig, about: _About) -> dict[str, str]:
    return {"checkpoint": config.checkpoint, "data": str(config.data), "describe": about.describe}


@dataclass(frozen=True)
class _About:
    """What decides the embeddings, as the machine knows it that computes them."""

    samples: int
    width: int
    identity: dict[str, Any]
    describe: str  # of the encoder, for people
    image_size: int  # px


@dataclass(frozen=True)
class _Opened:
    """All that a process needs in order to embed."""

    dataset: ShardSet
    encoder: FrozenEncoder
    head: torch.nn.Module
    precision: Precision
    writer: EmbeddingWriter
    about: _About


def _open_all(config: EmbedConfig, dist: DistContext) -> _Opened:
    """Raises UserError."""
    dataset, encoder, precision = _open(config, dist)
    head = _head(config, encoder, dist.device)
    width = _width(encoder, head, dist)
    identity = {
        "features": config.features,
        "normalised": config.normalise,
        "encoder": encoder.weights.identity,
        "image_size": encoder.recipe.image_size,
        "precision": precision.name,
        "dataset": dataset.fingerprint,
    }
    about = _About(dataset.num_samples, width, identity, encoder.weights.describe(), encoder.recipe.image_size)
    return _Opened(dataset, encoder, head, precision, _writer(config, about), about)


def _writer(config: EmbedConfig, about: _About) -> EmbeddingWriter:
    return EmbeddingWriter(config.out, config.format, about.samples, about.width, config.dtype, about.identity)


def embed_on_ray(config: EmbedConfig, *, quiet: bool = False) -> None:
    """Write the folder from the nodes of a Ray cluster: an actor for each GPU, or without any for each node.

    The dataset and OUT lie on a file system that all nodes share, or the dataset behind a URL. Raises UserError.
    """
    config = replace(config, **{name: _absolute(getattr(config, name)) for name in ("checkpoint", "data", "out")})
    with (
        ray_engine(config.engine, count=lambda done: len(done) if isinstance(done, list) else 0) as engine,
        ExitStack() as held,
    ):
        gpus = int(config.device == "cuda" or (config.device == "auto" and engine.gpus > 0))
        make = partial(_Embedder, config)
        about: _About = next(engine.run_in_actors(make, [_ABOUT], gpus=gpus, most=1))[1]
        writer = _writer(config, about)
        if not writer.start(config.overwrite, held):
            print(f"{config.out} is complete already; --overwrite writes it again")
            return
        print(f"encoder      {about.describe}, images of {about.image_size} px, {about.identity['precision']}")
        missing = writer.missing()
        groups = [missing[at : at + BLOCKS_OF_AN_ACTOR] for at in range(0, len(missing), BLOCKS_OF_AN_ACTOR)]
        with progress(quiet, total=len(missing), unit=" blocks", desc="embedding") as bar:
            for group_, _ in engine.run_in_actors(make, groups, gpus=gpus):
                if not_here := set(group_) & set(writer.missing()):
                    raise UserError(
                        f"block {min(not_here)} was written by another node of the Ray cluster, and is not in "
                        f"{config.out} here: OUT must lie on a file system that all nodes share"
                    )
                bar.set_postfix_str(describe_rates(engine.rates()).lstrip(", "), refresh=False)
                bar.update(len(group_))
            seconds = float(bar.format_dict["elapsed"])
        bad = writer.finish(_record(config, about))
    print(f"{config.out}: {about.samples:,} x {about.width} {config.dtype} in {duration(seconds)}")
    if bad:
        print(_BAD.format(len(bad)))


BLOCKS_OF_AN_ACTOR = 4  # computed in one go, 65,536 images: few enough to be repeated when a node is lost
_ABOUT = "about"  # the task of an actor that says what it would compute


def _absolute(place: Any) -> Any:
    """A path as all nodes understand it, whose working folders differ."""
    if isinstance(place, Path):
        return place.absolute()
    return str(Path(place).absolute()) if isinstance(place, str) and Path(place).exists() else place


class _Embedder:
    """An actor's work: blocks of embeddings, written by itself."""

    def __init__(self, config: EmbedConfig) -> None:
        stack = ExitStack()
        self._config = config
        self._dist = stack.enter_context(distributed(config.device))
        self._opened = _open_all(config, self._dist)
        atexit.register(stack.close)

    def __call__(self, item: Any) -> Any:
        """_About for _ABOUT; for a list of blocks, those that were written."""
        if item == _ABOUT:
            return self._opened.about
        opened = self._opened
        missing = sorted(set(item) & set(opened.writer.missing()))
        job = _Job(
            self._config, opened.dataset, opened.encoder, opened.head, opened.precision, self._dist, opened.writer
        )
        if not (self._config.out / UNFINISHED).is_dir():
            raise UserError(f"{self._config.out} is not there: OUT must lie on a file system that all nodes share")
        _embed_blocks(job, missing, quiet=True)
        return item


def _open(config: EmbedConfig, dist: DistContext) -> tuple[ShardSet, FrozenEncoder, Precision]:
    if config.format == "parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise UserError("--format parquet needs pyarrow: pip install 'siamstream[parquet]'") from None
    asked = EncoderConfig(config.checkpoint, backbone=config.backbone, image_size=config.image_size)
    encoder = open_frozen(asked, dist.device)
    dataset = open_indexed(config.data, config.loader)
    return dataset, encoder, choose_precision(config.precision, dist.device)


def _head(config: EmbedConfig, encoder: FrozenEncoder, device: torch.device) -> torch.nn.Module:
    """What follows the backbone. Raises UserError if the file holds no projector."""
    if config.features == "backbone":
        return torch.nn.Identity()
    state = encoder.weights.parts.projector
    if not state:
        raise UserError(f"--features projector: {config.checkpoint} holds no projector; embed with --features backbone")
    return sequential_of(state).to(device)


def sequential_of(state: dict[str, Tensor]) -> torch.nn.Sequential:
    """The chain of linear layers, batch norms and, where a number has no weights, ReLUs that ``state`` belongs to.

    In evaluation mode, without gradients. Raises UserError if there is anything else in it.
    """
    layers: list[torch.nn.Module] = []
    numbers = [re.match(r"(\d{1,3})\.", name) for name in state]
    if not all(numbers):
        raise UserError(
            f"--features projector: this projector is no chain of known layers: {', '.join(list(state)[:3])}"
        )
    for i in range(1 + max(int(number[1]) for number in numbers if number is not None)):
        weight = state.get(f"{i}.weight")
        if f"{i}.running_mean" in state:
            layers.append(torch.nn.BatchNorm1d(len(state[f"{i}.running_mean"]), affine=weight is not None))
        elif weight is not None and weight.ndim == 2:
            layers.append(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=f"{i}.bias" in state))
        else:
            layers.append(torch.nn.ReLU())
    chain = torch.nn.Sequential(*layers)
    try:
        chain.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"--features projector: this projector is no chain of known layers: {error}") from error
    return chain.eval().requires_grad_(False)


@torch.no_grad()
def _width(encoder: FrozenEncoder, head: torch.nn.Module, dist: DistContext) -> int:
    side = encoder.recipe.image_size
    return int(head(encoder.backbone(torch.zeros(1, encoder.recipe.channels, side, side, device=dist.device))).shape[1])


@dataclass(frozen=True)
class _Job:
    config: EmbedConfig
    dataset: ShardSet
    encoder: FrozenEncoder
    head: torch.nn.Module
    precision: Precision
    dist: DistContext
    writer: EmbeddingWriter


def _embed_blocks(job: _Job, missing: list[int], quiet: bool = False) -> float:
    """This rank's share of the missing blocks; returns the seconds that it took."""
    dataset, dist = job.dataset, job.dist
    mine = missing[dist.rank :: dist.world_size]
    images = sum(len(_ids(dataset, number)) for number in mine)
    with progress(quiet=quiet or not dist.is_main, total=images, unit="img", desc="embedding") as bar:
        for first in range(0, len(mine), BLOCKS_AT_ONCE):
            numbers = mine[first : first + BLOCKS_AT_ONCE]
            bad: set[int] = set()
            vectors = _vectors(job, numbers, bad)
            for number in numbers:
                ids, rows = _ids(dataset, number), []
                for _ in range(-(-len(ids) // IMAGES_PER_PASS)):
                    rows.append(next(vectors).float().cpu().numpy())
                    bar.update(len(rows[-1]))
                matrix = np.concatenate(rows)
                found = sorted(bad.intersection(ids.tolist()))
                matrix[np.isin(ids, found)] = np.nan
                labels = dataset.labels(ids).astype(np.int64)
                job.writer.write(Block(number, ids, sample_names(dataset, ids), labels, matrix, found))
        return float(bar.format_dict["elapsed"])


def _ids(dataset: ShardSet, number: int) -> np.ndarray:
    return np.arange(number * BLOCK, min((number + 1) * BLOCK, dataset.num_samples))


@torch.no_grad()
def _vectors(job: _Job, numbers: list[int], bad: set[int]) -> Iterator[Tensor]:
    """The features of the blocks ``numbers``, one after the other, pass by pass; ``bad`` collects unreadable ids."""

    def note(error: BadSampleError) -> None:
        if error.sample_id not in bad:
            print(f"bad sample, its row is nan: {error}", file=sys.stderr, flush=True)
        bad.add(error.sample_id)

    with open_images(
        job.dataset,
        job.encoder.recipe,
        replace(job.config.loader, max_bad_samples=job.dataset.num_samples),
        job.dist,
        ids=np.concatenate([_ids(job.dataset, number) for number in numbers]),
        batch=IMAGES_PER_PASS,
        dtype=job.precision.view_dtype,
        on_bad_sample=note,
    ) as batches:
        for x, _ in batches:
            with job.precision.autocast():
                out = job.head(job.encoder.backbone(x)).float()
            yield F.normalize(out, dim=1) if job.config.normalise else out


def sample_names(dataset: ShardSet, ids: np.ndarray) -> list[str]:
    """The path of each sample in its source; of a dataset that does not record it, its key."""
    recorded = dataset.names
    if recorded is not None:
        return [recorded[sample] for sample in ids.tolist()]
    names = []
    for sample in ids.tolist():
        try:
            names.append(dataset.key(sample))
        except (OSError, ValueError):
            names.append(f"sample {sample}")
    return names


if __name__ == "__main__":
    exit_on_user_error(main)
