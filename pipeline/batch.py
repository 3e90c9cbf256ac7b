"""Owns the batch as it travels from the shards to a back end: encoded pictures and where to cut them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64
from numpy.typing import NDArray

from pipeline.views import CentreCrops, ViewParams


@dataclass(frozen=True)
class Batch:
    """Some samples of one step, read but not decoded."""

    epoch: int
    step: int  # within the epoch
    ids: Int64[np.ndarray, " n"]  # the samples that the order asked for
    sources: Int64[np.ndarray, " n"]  # whose pictures are seen: ids, but where one was bad
    encoded: list[NDArray[np.uint8]]  # n pictures as they lie in the shards
    windows: ViewParams | CentreCrops  # what to cut out of each

    def __len__(self) -> int:
        """Samples."""
        return len(self.ids)

    def only(self, sample: int) -> Batch:
        """The batch of just one of its samples."""
        part = slice(sample, sample + 1)
        fields = {field.name: getattr(self.windows, field.name)[part] for field in dataclasses.fields(self.windows)}
        windows = type(self.windows)(**fields)
        return Batch(self.epoch, self.step, self.ids[part], self.sources[part], self.encoded[part], windows)


class UndecodableBatchError(Exception):
    """A back end could not decode a batch; which of its pictures is to blame is not known yet."""

    def __init__(self, batch: Batch, reason: str) -> None:
        """``reason``: the back end's own message."""
        super().__init__(reason)
        self.batch = batch
        self.reason = reason
