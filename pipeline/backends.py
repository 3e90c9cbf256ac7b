"""Owns the choice of back end, and what happens when one of them meets a picture that it cannot decode.

This is the one place that knows which back end runs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch
from PIL import UnidentifiedImageError
from typing_extensions import assert_never

from pipeline.assemble import Assembler
from pipeline.batch import Batch, UndecodableBatchError
from pipeline.errors import UserError
from pipeline.loader_config import LoaderConfig
from pipeline.reference import decode
from pipeline.span import Place
from pipeline.stages import Backend, Delivered, Setup
from pipeline.torchvision_backend import TorchvisionBackend
from pipeline.views import ViewRecipe

BackendName = Literal["dali", "torchvision"]


def choose_backend(requested: Literal["auto", "dali", "torchvision"]) -> tuple[BackendName, str]:
    """The back end that will run, and why. Raises UserError if the one asked for is not installed."""
    installed = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    match requested:
        case "torchvision":
            return "torchvision", "asked for"
        case "dali" if installed:
            return "dali", "asked for"
        case "dali":
            raise UserError(
                "backend dali: NVIDIA DALI is not installed. It exists for Linux (pip install nvidia-dali-cuda130); "
                "elsewhere use --backend torchvision"
            )
        case "auto" if installed:
            return "dali", "it is installed"
        case "auto":
            return "torchvision", "DALI is not installed; this back end is several times slower"
        case _:
            assert_never(requested)


def open_backend(config: LoaderConfig) -> Backend:
    """The back end that will run. Raises UserError as ``choose_backend``."""
    name, _ = choose_backend(config.backend)
    match name:
        case "dali":
            from pipeline.dali_backend import DaliBackend

            return DaliBackend()
        case "torchvision":
            return TorchvisionBackend()
        case _:
            assert_never(name)


class ViewMaker:
    """Makes views of one dataset on one device."""

    def __init__(
        self,
        assembler: Assembler,
        recipe: ViewRecipe,
        config: LoaderConfig,
        *,
        max_batch: int,
        device: torch.device,
        dtype: torch.dtype,
        pool: ThreadPoolExecutor,
        threads: int,
    ) -> None:
        """``pool`` has ``threads`` workers; ``dtype`` is that of the views."""
        self._assembler = assembler
        self._backend = open_backend(config)
        self._setup = Setup(recipe, config, max_batch, device, dtype, pool, threads)

    def deliver(self, places: Iterable[Place]) -> Iterator[Delivered]:
        """The views of each place in order, bad pictures replaced."""
        made = self._make(self._assembler.read_ahead(places, self._setup.config.read_ahead))
        while True:
            try:
                yield next(made)
            except StopIteration:
                return
            except UndecodableBatchError as error:
                yield self._recover(error)

    def _make(self, batches: Iterator[Batch]) -> Iterator[Delivered]:
        """Views of batches by the chosen back end; goes on after an UndecodableBatchError."""
        return self._backend.views(self._setup, batches)

    def _recover(self, error: UndecodableBatchError) -> Delivered:
        """Find the pictures that spoil a batch, put others in their place, and make it again."""
        while True:
            self._find_bad(error)
            batch = self._assembler.replace_bad(error.batch)
            try:
                return next(self._make(iter([batch])))
            except UndecodableBatchError as again:
                error = again

    def _find_bad(self, error: UndecodableBatchError) -> None:
        """Note the pictures that PIL cannot decode; if it can decode them all, those the back end cannot decode alone.

        Raises RuntimeError when every picture is good by itself: then the trouble is not the pictures'.
        """
        for faults in (self._pil_faults(error.batch), self._backend_faults(error.batch)):
            found = False
            for sample, fault in faults:
                found = True
                self._assembler.note_bad(int(error.batch.sources[sample]), fault)
            if found:
                return
        raise RuntimeError(f"a batch of pictures, each of them good, could not be decoded: {error.reason}") from error

    def _pil_faults(self, batch: Batch) -> Iterator[tuple[int, str]]:
        """(sample, fault) of the pictures that PIL cannot decode."""
        faults = self._setup.pool.map(lambda sample: _pil_fault(batch, sample), range(len(batch)))
        for sample, fault in enumerate(faults):
            if fault is not None:
                yield sample, fault

    def _backend_faults(self, batch: Batch) -> Iterator[tuple[int, str]]:
        """(sample, fault) of those that the back end cannot decode alone. One pipeline does: to make one takes long."""
        made = self._make(batch.only(sample) for sample in range(len(batch)))
        for sample in range(len(batch)):
            try:
                next(made)
            except UndecodableBatchError as error:
                yield sample, f"cannot be decoded: {error.reason}"


def _pil_fault(batch: Batch, sample: int) -> str | None:
    """Why PIL cannot decode one picture of a batch; None if it can."""
    try:
        decode(batch.encoded[sample].tobytes())
    except UnidentifiedImageError:  # its own text holds an address, and would not be the same after a resume
        return "cannot be decoded: not a picture, or of an unknown format"
    except (OSError, ValueError, SyntaxError) as error:
        return f"cannot be decoded: {error}"
    return None
