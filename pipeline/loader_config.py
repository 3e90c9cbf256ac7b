"""Owns the loader's settings. What is delivered depends on none of them, only how fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class DaliConfig:
    """How DALI works."""

    decoder: Literal["mixed", "cpu"] = "mixed"  # on a GPU: nvJPEG and the hardware decoder, or the CPU
    hw_decoder_load: float = 0.65  # share of a batch for the hardware decoder (DALI's default)
    preallocate_side: int = 0  # px; GPU memory for pictures of this side is set aside at the start; 0: grows as needed
    prefetch: int = 2  # batches in DALI's own queue


@dataclass(frozen=True)
class LoaderConfig:
    """How one rank's loader works."""

    backend: Literal["auto", "dali", "torchvision"] = "auto"  # auto: DALI where it is installed
    threads: int = 0  # that decode and transform; 0: the machine's cores / its ranks
    prefetch: int = 2  # finished batches that may wait for the model
    read_ahead: int = 4  # batches whose bytes are read before they are needed
    max_bad_samples: int = 100  # pictures that may turn out bad and be replaced before the run stops
    dali: DaliConfig = field(default_factory=DaliConfig)
