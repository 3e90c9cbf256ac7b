"""The loader's settings. None of them decides which samples come or how their views are drawn.

They decide the speed, and which decoder runs: backend, dali.decoder, dali.hw_decoder_load and dali.smooth_chroma may
round pixels differently. max_bad_samples ends a run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pipeline.backends.base import DaliConfig
from pipeline.common.errors import require
from pipeline.common.flags import group, own_flags
from pipeline.dataset.remote_cache import CacheConfig

RANKS_APART = 2  # steps by which one rank of a machine may be behind another


@own_flags
@dataclass(frozen=True)
class LoaderConfig:
    """How one rank's loader works."""

    # Library that decodes and cuts; auto: DALI where it is installed, else torchvision.
    backend: Literal["auto", "dali", "torchvision"] = "auto"
    # Threads that decode and transform in each process; 0: the machine's cores divided by its processes.
    threads: int = 0
    # Finished batches that may wait for the model.
    prefetch: int = 2
    # Batches whose bytes are read before they are needed.
    read_ahead: int = 4
    # Compare each image's bytes with their CRC-32 when they are read: 0.03 ms of a core for 110 KB. Without it an image
    # that has changed on the disk is found only if it can no longer be decoded.
    verify_checksums: bool = True
    # Images that may turn out bad and be replaced before the run stops.
    max_bad_samples: int = 100
    dali: DaliConfig = field(default_factory=DaliConfig)
    cache: Annotated[CacheConfig, group("remote")] = field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        require("--threads", self.threads, self.threads >= 0, "it is 0 (all cores) or a number of threads")
        require("--prefetch", self.prefetch, self.prefetch >= 1, "at least 1 finished batch must find room")
        require("--read-ahead", self.read_ahead, self.read_ahead >= 1, "at least 1 batch must be read")
        require("--max-bad-samples", self.max_bad_samples, self.max_bad_samples >= 0, "it is 0 or more")

    @property
    def max_steps_behind(self) -> int:
        """Steps that some process of the machine may still read when another begins a later one."""
        return self.read_ahead + self.prefetch + self.dali.prefetch + RANKS_APART
