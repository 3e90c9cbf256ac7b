"""kNN accuracy of an encoder's features: weighted vote of the nearest neighbours, Wu et al. 2018 (arXiv:1805.01978).

    torchrun --standalone --nproc-per-node=8 train/knn.py --data DIR --val-data DIR --checkpoint FILE
    python train/knn.py --data DIR --val-data DIR --checkpoint RUN_DIR --k 1,20,200                     (one process)

Owns what is compared with what: as a script, and as the monitor that pretraining calls. Each rank keeps its share of
the training features and sees the others' one share at a time. Memory of a rank in bytes: 4 x dimensions x (2 shares of
the training features, or 1 in one process + its share of the validation features); half of the training part with
--feature-dtype float16; about 1 GB beside them. ImageNet's 1.28 M x 2048 are 10.5 GB in one process (5.2 GB in float16)
and 2.6 GB (1.3 GB) on each of eight GPUs.
"""

from __future__ import annotations

import train.openmp  # noqa: F401  # before torch

# isort: split
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from pipeline.common.errors import UserError, check_at_least_1, exit_on_user_error
from pipeline.common.files import disk_errors, write_json
from pipeline.common.flags import group, usage
from pipeline.common.locations import DatasetPlace, LocalPath
from pipeline.loader.config import LoaderConfig
from pipeline.sharding.index_cache import make_indexes
from train.distributed.collectives import on_all_ranks, on_rank0, print0
from train.distributed.process_group import DistContext, distributed, exit_once, found_by_every_rank, read_launch
from train.evaluation.features import (
    EncoderConfig,
    FrozenEncoder,
    ImageSource,
    Samples,
    check_same_classes,
    open_frozen,
    open_labelled,
)
from train.evaluation.knn_monitor import Score, bank_ids, check_temperature, score_neighbours
from train.optimization.precision import Precision, PrecisionName, choose_precision


@dataclass(frozen=True)
class KnnEvalConfig:
    """Weighted kNN accuracy of an encoder: the images of --val-data are classified by their neighbours in --data."""

    # Labelled dataset to compare with.
    data: DatasetPlace
    # Labelled dataset to classify, of the same classes; every image counts exactly once.
    val_data: DatasetPlace
    encoder: Annotated[EncoderConfig, group("encoder")]
    # Neighbours that vote; several numbers separated by commas cost one pass.
    k: str = "20"
    # Temperature of their weights [Wu et al. 2018, section 4].
    temperature: float = 0.07
    # Samples of --data to compare with, spread over it; default: all.
    bank_size: int | None = None
    # Number format of the kept training features; float16 halves their memory.
    feature_dtype: Literal["float32", "float16"] = "float32"
    # File to write the accuracies to as well.
    json: LocalPath | None = None
    # Device that computes; auto: the GPUs if there are any.
    device: Literal["auto", "cuda", "cpu"] = "auto"
    # Number format of the forward pass; auto: bf16 on a GPU (fp16 before Ampere), fp32 on a CPU.
    precision: PrecisionName = "auto"
    loader: Annotated[LoaderConfig, group("loader")] = field(default_factory=LoaderConfig)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[1-9]\d{0,14}(,[1-9]\d{0,14})*", self.k):
            raise UserError(f"--k {self.k}: write whole numbers from 1 up, separated by commas, as in 10,20,200")
        check_temperature("--temperature", self.temperature)
        if self.bank_size is not None:
            check_at_least_1("--bank-size", self.bank_size)

    @property
    def ks(self) -> list[int]:
        """The numbers of neighbours, each once, rising."""
        return sorted({int(k) for k in self.k.split(",")})


def main() -> None:
    """Run the command."""
    launch = read_launch()
    with exit_once(), found_by_every_rank(launch):
        config = tyro.cli(
            KnnEvalConfig, prog=usage("--data DIR --val-data DIR --checkpoint FILE"), console_outputs=launch.is_main
        )
    make_indexes(config.loader.cache, config.data, config.val_data)
    with exit_once(), distributed(config.device, launch=launch) as dist:
        evaluate(config, dist)


def evaluate(config: KnnEvalConfig, dist: DistContext) -> dict[int, Score]:
    """Print the accuracies and write them. Raises UserError for mistakes. A collective."""
    bank, queries, encoder, precision = on_all_ranks(dist, lambda: _open(config, dist.device))
    ks = config.ks
    source = ImageSource(encoder.recipe, config.loader, dist, precision.autocast, precision.view_dtype)
    print0(
        dist, f"encoder      {encoder.weights.describe()}, images of {encoder.pixels.image_size} px, {precision.name}"
    )
    print0(dist, f"kNN          {len(queries.ids):,} queries against {len(bank.ids):,} samples")
    if bank.dataset.fingerprint == queries.dataset.fingerprint:
        print0(dist, "note: --data and --val-data are the same images, and each is its own nearest neighbour")
    if max(ks) > len(bank.ids):
        print0(dist, f"note: --k {max(ks)} is more than there are samples to compare with: all of them vote")
    dtype = torch.float16 if config.feature_dtype == "float16" else torch.float32
    scores = score_neighbours(
        encoder.backbone, bank, queries, source, ks=ks, temperature=config.temperature, dtype=dtype
    )
    for k, score in scores.items():
        print0(dist, f"k {k:<10} top-1 {score.top1:.2f} % ({score.correct:,} of {score.total:,})")
    if config.json is not None:
        on_rank0(dist, lambda: _write(config, config.json, scores))
    return scores


def _open(config: KnnEvalConfig, device: torch.device) -> tuple[Samples, Samples, FrozenEncoder, Precision]:
    """Bank, queries, encoder and number format, found out by one rank alone. Raises UserError."""
    train = open_labelled(config.data, "--data", config.loader)
    val = open_labelled(config.val_data, "--val-data", config.loader)
    check_same_classes("--val-data", val, train)
    bank = Samples.labelled(train)
    if config.bank_size is not None:
        bank = Samples.sorted(train, bank.ids[bank_ids(len(bank.ids), config.bank_size)])
    encoder, precision = open_frozen(config.encoder, device), choose_precision(config.precision, device)
    return bank, Samples.labelled(val), encoder, precision


def _write(config: KnnEvalConfig, path: Path | None, scores: dict[int, Score]) -> None:
    assert path is not None
    values: dict[str, Any] = {"checkpoint": config.encoder.checkpoint, "temperature": config.temperature}
    rows = [{"k": k, "top1": score.top1, "correct": score.correct, "total": score.total} for k, score in scores.items()]
    with disk_errors(f"writing {path}", f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**values, "knn": rows})


if __name__ == "__main__":
    exit_on_user_error(main)
