"""Owns the back end that decodes with DALI. Import it only where DALI is installed: see backends.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from pipeline.batch import Batch
from pipeline.buffers import HeldUntilRead
from pipeline.cut import CutSquares
from pipeline.dali import DaliCrops, DaliPictures, DaliSquares, release_unused_memory
from pipeline.photometric import Photometric
from pipeline.stages import Delivered, Setup, Stages


class DaliBackend:
    """Decodes with DALI; the colours follow in the compiled photometric stage."""

    def views(self, setup: Setup, batches: Iterator[Batch]) -> Iterator[Delivered]:
        """Batches and their views; the iterator raises UndecodableBatchError, after which it may go on."""
        photometric, held = _photometric(setup), HeldUntilRead()

        def finish(cut: tuple[Batch, list[UInt8[Tensor, "n s s 3"]]]) -> Delivered:
            batch, squares = cut
            views = photometric(squares, batch.windows)
            if setup.device.type == "cuda":
                held.keep(squares)
            return batch, views

        return map(finish, cut_squares(setup, batches))  # no generator, which an error would end

    def stages(self, setup: Setup) -> Stages:
        """The stages as ``views`` sets them up."""
        return Stages(
            decode=lambda batches: DaliPictures(
                batches, setup.max_batch, setup.threads, setup.device, setup.config.dali
            ),
            crop=lambda batches: (squares for _, squares in _cut_decoded(setup, batches)),
            photometric=_photometric(setup),
        )

    def release_memory(self) -> None:
        """Give back what DALI keeps for later pipelines."""
        release_unused_memory()


def cut_squares(setup: Setup, batches: Iterator[Batch]) -> Iterator[tuple[Batch, list[UInt8[Tensor, "n s s 3"]]]]:
    """Batches decoded by DALI and cut: on a GPU by DALI too, on a CPU by torch.

    The iterator raises UndecodableBatchError, after which it may go on.
    """
    settings = (setup.max_batch, setup.threads, setup.device, setup.config.dali)
    if setup.device.type == "cuda":
        return DaliSquares(batches, setup.recipe.image_size, *settings)
    return CutSquares(DaliPictures(batches, *settings), setup.recipe.image_size, setup.pool, setup.threads)


def _cut_decoded(setup: Setup, batches: Iterator[Batch]) -> Iterator[Any]:
    """As ``cut_squares``, from batches of decoded pictures."""
    if setup.device.type == "cuda":
        settings = (setup.max_batch, setup.threads, setup.device, setup.config.dali)
        return DaliCrops(batches, setup.recipe.image_size, *settings)
    decoded = ((batch, [torch.from_numpy(picture) for picture in batch.encoded]) for batch in batches)
    return CutSquares(decoded, setup.recipe.image_size, setup.pool, setup.threads)


def _photometric(setup: Setup) -> Photometric:
    return Photometric(setup.recipe, setup.device, setup.dtype, setup.pool, setup.threads)
