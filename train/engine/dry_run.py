"""--dry-run: what a run will need of disk, cache and memory, worked out from the built run. Nothing is written.

Weights, gradients and the optimizer's state are counted. The memory of activations is counted on a small batch: what
autograd keeps of a forward pass of the backbone, for each size of views, times the images of a pass.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from train.engine.run import Run
from train.storage.checkpoints import CHECKPOINTS

PROBE_IMAGES = 2  # batch norm needs two
LINE_BYTES = 400  # of metrics.jsonl, at most, with the ranks' own waits left out


def needs(run: Run) -> Iterator[str]:
    """Lines about disk, cache and memory. On every rank, each about itself."""
    yield f"  disk         {_disk(run)}"
    yield f"  cache        {_cache(run)}"
    yield f"  memory       {_memory(run)}"
    yield "dry run: nothing was written, and no step was trained"


def too_little_disk(run: Run) -> Iterator[str]:
    """A warning where the disk of the run folder has no room for the checkpoints; none otherwise."""
    checkpoint, whole, free = _room(run)
    if free < whole:
        yield (
            f"warning: {run.config.keep_checkpoints} + 1 checkpoints of {_size(checkpoint)} need {_size(whole)} with "
            f"the encoder and the log, and {_size(free)} are free for them at --run-dir {run.config.run_dir}: free "
            "some space, lower --keep-checkpoints, or name another folder"
        )


def _disk(run: Run) -> str:
    checkpoint, whole, free = _room(run)
    warning = "" if free > whole else ": TOO LITTLE, free some space or choose another --run-dir"
    return (
        f"{_size(whole)} in --run-dir: {run.config.keep_checkpoints} + 1 checkpoints of {_size(checkpoint)}, the "
        f"encoder, the log; {_size(free)} are free{warning}"
    )


def _room(run: Run) -> tuple[int, int, int]:
    """Bytes of a checkpoint, of all that a run leaves, and those that are free for it, with its former checkpoints."""
    weights, state = _bytes(_tensors(run.model)), _optimizer_bytes(run)
    memory = 0 if run.memory is None else run.dataset.num_samples * (run.model.memory_dim or 0) * 4
    checkpoint = weights + state + memory
    encoder = 2 * _bytes(_tensors(run.model.backbone))  # backbone.safetensors, and the copy for timm
    lines = run.plan.total_steps // run.config.log_every * LINE_BYTES
    whole = (run.config.keep_checkpoints + 1) * checkpoint + encoder + lines  # one more while it is being written
    folder = run.config.run_dir
    while not folder.exists():
        folder = folder.absolute().parent
    former = [path.stat().st_size for path in (run.config.run_dir / CHECKPOINTS).glob("*") if path.is_file()]
    return checkpoint, whole, shutil.disk_usage(folder).free + sum(former)


def _cache(run: Run) -> str:
    images = {part: sum(shard["bytes"] for shard in part.info["shards"]) for part in run.dataset.parts}
    fetched = sum(size for part, size in images.items() if part.is_remote)
    if fetched:
        cache = run.config.loader.cache
        return f"shards of {_size(fetched)} are fetched into {cache.folder}, at most {cache.cache_size} at a time"
    size = _size(sum(images.values()))
    return f"none: the dataset is on a disk; {size} are read in each epoch, from memory where they fit"


def _memory(run: Run) -> str:
    """The accelerator's, or of a CPU the machine's, for one process."""
    weights = _bytes(_tensors(run.model))
    gradients = _bytes(p for p in run.model.parameters() if p.requires_grad)
    state = _optimizer_bytes(run)
    sides = [view.image_size for view in run.config.views.per_view]
    kept = {side: _kept(run, side) for side in set(sides)}
    activations = run.plan.micro_batch * sum(kept[side] for side in sides)
    value = torch.empty((), dtype=run.precision.view_dtype).element_size()
    ahead = (
        run.plan.micro_batch
        * sum(run.config.views.channels * side**2 * value for side in sides)
        * (run.config.loader.prefetch + 1)
    )
    whole = weights + gradients + state + activations + ahead
    where = "GPU memory" if run.dist.device.type == "cuda" else "memory (the same numbers hold for a GPU)"
    return (
        f"about {_size(whole)} of {where} a process: weights {_size(weights)}, gradients {_size(gradients)}, optimizer "
        f"{_size(state)}, activations {_size(activations)}, views ahead {_size(ahead)}; heads, decoders and the "
        "libraries' own memory come on top"
    )


def _kept(run: Run, side: int) -> int:
    """Bytes that autograd keeps for one image of ``side`` px, counted once for each piece of memory."""
    own = {p.untyped_storage().data_ptr() for p in (*run.model.parameters(), *run.model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    channels = run.config.views.channels
    images = torch.randn(PROBE_IMAGES, channels, side, side, device=run.dist.device, dtype=run.precision.view_dtype)
    images = images.to(memory_format=torch.channels_last)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), run.precision.autocast():
        out = run.model.backbone(images)  # alive until all is counted: freed memory would be counted once
    del out
    return sum(kept.values()) // PROBE_IMAGES


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _optimizer_bytes(run: Run) -> int:
    """Of momentum; AdamW keeps two moments."""
    trained = _bytes(p for group in run.optimizer.param_groups for p in group["params"])
    return (2 if run.config.optim.optimizer == "adamw" else 1) * trained


def _size(count: int) -> str:
    """Bytes for people: 12 kB, 340 MB, 1.5 GB."""
    if count < 1e6:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"
