"""The DALI back end: on a CPU DALI decodes; on a GPU it decodes each image once and cuts one square for each view.

The graph draws nothing and reads no files: encoded bytes and windows come in through external_source, batch by batch,
in the order in which they are pulled. Colour, blur and normalisation follow in pipeline/backends/photometric.py.
Only this module imports nvidia.dali.
"""

from __future__ import annotations

import re
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from nvidia import nvimgcodec
from nvidia.dali import backend as dali_backend
from nvidia.dali import types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

from pipeline.backends.base import (
    BackendContext,
    BackendStages,
    Batch,
    DaliConfig,
    HeaderCheck,
    UndecodableBatchError,
    ViewBatch,
)
from pipeline.backends.cpu_crop import CutSquares
from pipeline.backends.photometric import Photometric
from pipeline.common.buffers import HeldUntilRead
from pipeline.common.system import captured_stderr
from pipeline.sampling.views import CentreCrops, Interpolation, ViewParams, ViewRecipe

_END = object()
GRAPH_SEED = 0  # DALI needs one; nothing in the graph draws
# Errors of DALI with these texts are not caused by an image; searching for one would hide them.
_GPU_AT_FAULT = re.compile(r"CUDA (runtime|driver) API error|CUDA allocation failed|cudaError|CUDA_ERROR_")


class _Inputs:
    """The batches that DALI pulls. A separate object, so that no reference cycle keeps the pipeline alive.

    A pipeline that a forked child inherits aborts the child. DALI 2.4 ends the process (a segmentation fault, in
    batches of 32 and more) when its decoder cannot read an image's header. Therefore every header is parsed first,
    by the decoder's own parser, and a batch with an unreadable one is not given to DALI. A loader's reading threads
    do so ahead of time: in the thread that feeds DALI it would take 2.7 us an image.
    """

    def __init__(self, batches: Iterator[Batch], encoded: bool) -> None:
        """``encoded``: the batches hold encoded images."""
        self._batches = batches
        self._encoded = encoded
        self._next = next(batches, None)
        self.windows = self._next.windows if self._next is not None else None  # of the first batch; all are of one kind
        self.pulled: deque[tuple[Batch, str | None]] = (
            deque()
        )  # in order, with the reason if DALI was not given the batch
        self._fed: deque[list[NDArray]] = deque()  # windows that DALI may still read: it need not copy them
        self.failed = False  # whether the batches' own iterator failed; DALI's errors are of the same class

    def pull(self) -> list[list[NDArray] | NDArray]:
        """One batch's inputs, in the order of the graph: images as a list, windows as one array each.

        StopIteration at the end. A list of windows would cost DALI 13 us an image, an array costs 0.8.
        """
        while True:
            batch, self._next = (self._read() if self._next is None else self._next), None
            refusal = _unreadable_header(batch) if self._encoded else None
            self.pulled.append((batch, refusal))
            if refusal is None:
                break
        match batch.windows:
            case ViewParams(crop=crop, views=views):
                windows = [crop[:, view, corner : corner + 2] for view in range(views) for corner in (0, 2)]
            case CentreCrops(start=start, end=end):
                windows = [start, end]
        self._fed.append(arrays := [np.ascontiguousarray(window) for window in windows])
        return [batch.encoded, *arrays]

    def taken(self) -> tuple[Batch, str | None]:
        """The oldest batch that was pulled, once DALI has read it or has refused it."""
        batch, refusal = self.pulled.popleft()
        if refusal is None:
            self._fed.popleft()
        return batch, refusal

    def _read(self) -> Batch:
        try:
            return next(self._batches)
        except BaseException as error:
            self.failed = not isinstance(error, StopIteration)
            raise


class DaliImages(Iterator[tuple[Batch, list[Tensor]]]):
    """An iterator over batches and their decoded images, uint8 ``[h, w, 3]``; on a GPU, where DALI cuts, no images."""

    _encoded = True  # whether the batches hold encoded images

    def __init__(
        self, batches: Iterator[Batch], max_batch: int, threads: int, device: torch.device, config: DaliConfig
    ) -> None:
        """``batches`` is pulled ``config.prefetch`` ahead; all its batches hold views, or all hold centre crops."""
        self._pipeline = Pipeline(  # the first attribute goes first: it may still read the inputs, uncopied
            batch_size=max_batch,
            num_threads=threads,
            device_id=device.index or 0 if device.type == "cuda" else None,
            seed=GRAPH_SEED,
            prefetch_queue_depth=config.prefetch,
            exec_dynamic=True,
        )
        self._inputs = _Inputs(batches, self._encoded)
        self._made: Any = None  # DALI's outputs for the next batch that it was given, or its error
        self._device = device
        self._config = config
        with self._pipeline:
            self._pipeline.set_outputs(*self._graph())
        self._pipeline.build()

    def __next__(self) -> tuple[Batch, list[UInt8[Tensor, "*shape 3"]]]:
        """The next batch and the outputs of the graph.

        Raises UndecodableBatchError, after which the iteration may go on; RuntimeError if the GPU failed; and whatever
        the batches' own iterator raises.
        """
        if self._made is None:
            self._made = self._run()
        if not self._inputs.pulled:
            raise StopIteration
        batch, refusal = self._inputs.taken()
        if refusal is not None:
            raise UndecodableBatchError(batch, refusal)
        made, self._made = self._made, None
        if isinstance(made, RuntimeError):
            raise UndecodableBatchError(batch, _reason(made, batch)) from made
        return batch, self._tensors(made)

    def _run(self) -> Any:
        """Outputs; or the error that the next batch has caused; or _END when there is no further batch.

        The error comes without its traceback, whose frames would keep the pipeline alive: see _Inputs.
        """
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            return self._pipeline.run(stream)
        except StopIteration:
            return _END
        except RuntimeError as error:
            if self._inputs.failed or _GPU_AT_FAULT.search(str(error)):
                raise
            return error.with_traceback(None)

    def _graph(self) -> list[DataNode]:
        pull = self._pull()
        return [self._decode(self._source(lambda: pull()[0]))]

    def _tensors(self, outputs: Any) -> list[Tensor]:
        if self._device.type == "cuda":  # decoded for profiling only
            return []
        return [torch.from_dlpack(image) for image in outputs[0]]

    def _pull(self) -> Callable[[], Any]:
        """``_inputs.pull``, without a reference to the inputs.

        DALI keeps what it calls in reference cycles of its own, and with it would keep the loader and its images.
        """
        pull = weakref.WeakMethod(self._inputs.pull)

        def call() -> Any:
            method = pull()
            assert method is not None  # DALI calls only while ``_run`` runs
            return method()

        return call

    def _source(self, pull: Callable[[], Any], **options: Any) -> Any:
        """DALI's way to ask for inputs.

        On a CPU it reads them where they lie: they are kept until the outputs that were made of them have come. On a
        GPU it copies: its kernels and copies may read them after that.
        """
        return fn.external_source(source=pull, batch=True, no_copy=self._device.type == "cpu", **options)

    def _decode(self, encoded: DataNode) -> DataNode:
        mixed = self._device.type == "cuda" and self._config.decoder == "mixed"
        options: dict[str, Any] = {
            "hw_decoder_load": self._config.hw_decoder_load,
            "preallocate_width_hint": self._config.preallocate_side,
            "preallocate_height_hint": self._config.preallocate_side,
            "device_memory_padding": self._config.device_memory_padding << 20,
            "host_memory_padding": self._config.host_memory_padding << 20,
            "jpeg_fancy_upsampling": self._config.smooth_chroma,  # as PIL and DALI's CPU decoder do
        }
        decoded = fn.decoders.image(
            encoded,
            device="mixed" if mixed else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,  # torchvision ignores EXIF orientation; DALI would turn the image
            **(options if mixed else {}),
        )
        return decoded.gpu() if self._device.type == "cuda" and not mixed else decoded


class DaliSquares(DaliImages):
    """An iterator over batches of cut squares, uint8 ``[n, s, s, 3]`` for each view, on ``device``."""

    def __init__(
        self,
        batches: Iterator[Batch],
        recipe: ViewRecipe,
        max_batch: int,
        threads: int,
        device: torch.device,
        config: DaliConfig,
    ) -> None:
        """As DaliImages; ``recipe`` gives each view's size and interpolation."""
        self._recipe = recipe
        super().__init__(batches, max_batch, threads, device, config)

    def _tensors(self, outputs: Any) -> list[Tensor]:
        return [torch.from_dlpack(output.as_tensor()) for output in outputs]

    def _graph(self) -> list[DataNode]:
        match self._inputs.windows:
            case CentreCrops():
                return self._centre_squares()
            case ViewParams(views=views):
                return self._view_squares(views)
            case None:  # there is no batch
                return self._view_squares(len(self._recipe.per_view))

    def _view_squares(self, views: int) -> list[DataNode]:
        """Cut, then resize: nothing outside the window may bleed in."""
        encoded, *windows = self._source(self._pull(), num_outputs=1 + 2 * views)
        return self._cut(self._decode(encoded), windows)

    def _cut(self, images: DataNode, windows: list[DataNode]) -> list[DataNode]:
        return [
            _resize(fn.slice(images, start=start, shape=shape, axes=(0, 1)), own.image_size, own.interpolation)
            for start, shape, own in zip(windows[::2], windows[1::2], self._recipe.per_view, strict=False)
        ]

    def _centre_squares(self) -> list[DataNode]:
        """Resize as if the whole image were resized, but compute its centre alone."""
        encoded, start, end = self._source(self._pull(), num_outputs=3)
        return [_resize(self._decode(encoded), self._recipe.image_size, roi_start=start, roi_end=end)]


class DaliCrops(DaliSquares):
    """The crops alone, for profiling; in place of encoded images batches hold decoded ``[h, w, 3]`` on ``device``."""

    _encoded = False

    def _graph(self) -> list[DataNode]:
        """Images may be on the GPU, windows never are, so each has a source of its own."""
        pull_both = self._pull()
        waiting: tuple[deque, deque] = (deque(), deque())

        def pull(half: int) -> Any:
            if not waiting[half]:
                images, *windows = pull_both()
                waiting[0].append(images)
                waiting[1].append(windows)
            return waiting[half].popleft()

        processor = "gpu" if self._device.type == "cuda" else "cpu"
        images = fn.external_source(source=lambda: pull(0), device=processor, layout="HWC", batch=True)
        windows = fn.external_source(source=lambda: pull(1), num_outputs=2 * len(self._recipe.per_view), batch=True)
        return self._cut(images, list(windows))


def _resize(images: DataNode, side: int, interpolation: Interpolation = "bilinear", **window: DataNode) -> DataNode:
    kind = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}[interpolation]
    return fn.resize(images, size=(side, side), interp_type=kind, antialias=True, **window)


_NO_REASON = "its codec gives no reason"


class CodecError(Exception):
    """DALI cannot decode an image; the message is its codec's own."""


class DaliDecoder:
    """Decodes single images on the CPU with the operator of the graphs: to compare back ends, not to train."""

    def __init__(self) -> None:
        """Build the pipeline. One thread uses it."""
        self._pulled = pulled = [np.zeros(0, np.uint8)]  # no cycle with the pipeline: see _Inputs
        self._pipeline = Pipeline(
            batch_size=1, num_threads=1, device_id=None, seed=GRAPH_SEED, prefetch_queue_depth=1, exec_dynamic=True
        )
        with self._pipeline:
            encoded = fn.external_source(source=lambda: pulled, batch=True)
            self._pipeline.set_outputs(
                fn.decoders.image(encoded, device="cpu", output_type=types.RGB, adjust_orientation=False)
            )
        self._pipeline.build()

    def decode(self, encoded: NDArray[np.uint8], *, echo: bool = False) -> UInt8[np.ndarray, "h w 3"]:
        """The pixels of one encoded image (``[bytes]``), RGB. Raises CodecError.

        ``echo``: what codecs print to stderr is printed as well, not only made the error's message.
        """
        with captured_stderr(echo=echo) as printed:
            fault = _header_fault(encoded)
            if fault is None:
                self._pulled[0] = encoded
                try:
                    return np.array(self._pipeline.run()[0][0])
                except RuntimeError as error:
                    fault = _message(error)
        raise CodecError(_codec_message(printed[0]) or (_NO_REASON if fault.endswith(":") else fault))


def _codec_message(printed: str) -> str:
    """The codec's message in what it printed: its first error, without colours, times, source files and functions."""
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line).strip() for line in printed.splitlines()]
    for pattern in _CODEC_ERRORS:
        for line in lines:
            if (found := pattern.search(line)) is not None:
                return found[1].strip()
    return next(filter(None, lines), "")


# What DALI's codecs print: OpenCV's exceptions and warnings, libpng, nvImageCodec's own parsers and libtiff.
_CODEC_ERRORS = tuple(
    re.compile(pattern)
    for pattern in (
        r"error: \(-?\d+:[^)]*\) (.*?)(?: in function .*)?$",
        r"(libpng error: .*)",
        r"\[ERROR\]\s*(\[.*)",
        r"\[ ?WARN:[^]]*\] global \S+ \S+ (.*)",
    )
)


def release_unused_memory() -> None:
    """Give back the memory that DALI keeps for later pipelines."""
    dali_backend.ReleaseUnusedMemory()  # type: ignore[attr-defined]  # its stub lacks it


def _unreadable_header(batch: Batch) -> str | None:
    """Why DALI's decoder would not take one of the images; None if it would take them all."""
    faults = map(_header_fault, batch.encoded) if batch.header_faults is None else batch.header_faults
    for image, fault in zip(batch.encoded, faults, strict=True):
        if fault is not None:
            own = _own_message(image) if len(batch) == 1 else None
            return f"DALI: its decoder cannot read the header: {own or fault}"
    return None


def _header_fault(image: NDArray[np.uint8]) -> str | None:
    try:
        _ = nvimgcodec.CodeStream(image).height  # the constructor alone does not read it
    except RuntimeError as error:
        return " ".join(str(error).split())
    return None


def _reason(error: RuntimeError, batch: Batch) -> str:
    """DALI's message in one line; of a single image, whose codec prints what DALI leaves out, the codec's."""
    message = _message(error)
    if len(batch) == 1 and message.endswith(":"):
        message = f"{message} {_own_message(batch.encoded[0]) or _NO_REASON}"
    return f"DALI: {message}"


def _message(error: RuntimeError) -> str:
    """DALI's message in one line, without the trace of the graph's construction before it."""
    message = str(error).rpartition("encountered:")[2]
    lines = (line.strip() for line in message.splitlines())
    return " ".join(line for line in lines if line and not line.startswith(("C++ context", "Current pipeline")))


def _own_message(image: NDArray[np.uint8]) -> str | None:
    """The message of the codec that cannot decode ``image``; None if the CPU's codecs can."""
    try:
        DaliDecoder().decode(image, echo=True)
    except CodecError as error:
        return str(error)
    return None


class DaliBackend:
    """Decodes with DALI; the colours follow in the compiled photometric stage."""

    def __init__(self) -> None:
        """Keeps squares that a GPU's queued kernels will read, also when the iterator that made them is gone."""
        self._held = HeldUntilRead()

    def views(self, context: BackendContext, batches: Iterator[Batch]) -> Iterator[ViewBatch]:
        """The views of each batch; the iterator raises UndecodableBatchError, after which it may go on."""
        photometric = _photometric(context)

        def finish(cut: tuple[Batch, list[UInt8[Tensor, "n _ _ 3"]]]) -> ViewBatch:
            batch, squares = cut
            views = photometric(squares, batch.windows)
            if context.device.type == "cuda":
                self._held.keep(squares)
            return ViewBatch.of(batch, views)

        return map(finish, cut_squares(context, batches))  # not a generator, which would end at the first error

    def stages(self, context: BackendContext) -> BackendStages:
        """The stages as ``views`` sets them up."""
        return BackendStages(
            decode=lambda batches: DaliImages(
                batches, context.max_batch, context.threads, context.device, context.dali
            ),
            crop=lambda batches: (squares for _, squares in _cut_decoded(context, batches)),
            photometric=_photometric(context),
        )

    def header_check(self) -> HeaderCheck:
        """The decoder's own parser: see _Inputs."""
        return _header_fault

    def release_memory(self) -> None:
        """Give back what DALI keeps for later pipelines."""
        release_unused_memory()


def cut_squares(
    context: BackendContext, batches: Iterator[Batch]
) -> Iterator[tuple[Batch, list[UInt8[Tensor, "n _ _ 3"]]]]:
    """Batches decoded by DALI and cut: on a GPU by DALI too, on a CPU by torch.

    The iterator raises UndecodableBatchError, after which it may go on.
    """
    settings = (context.max_batch, context.threads, context.device, context.dali)
    if context.device.type == "cuda":
        return DaliSquares(batches, context.recipe, *settings)
    return CutSquares(DaliImages(batches, *settings), context.recipe, context.pool, context.threads)


def _cut_decoded(context: BackendContext, batches: Iterator[Batch]) -> Iterator[Any]:
    """As ``cut_squares``, from batches of decoded images."""
    if context.device.type == "cuda":
        settings = (context.max_batch, context.threads, context.device, context.dali)
        return DaliCrops(batches, context.recipe, *settings)
    decoded = ((batch, [torch.from_numpy(image) for image in batch.encoded]) for batch in batches)
    return CutSquares(decoded, context.recipe, context.pool, context.threads)


def _photometric(context: BackendContext) -> Photometric:
    return Photometric(context.recipe, context.device, context.dtype, context.pool, context.threads)
