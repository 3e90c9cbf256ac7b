"""Flags with which each method trains at the scale of a machine: the method's own recipe on a shared backbone.

Used by `tools/reproduce.py methods` and `tools/demo.py --method NAME`. On a GPU the optimizers are those of the
papers (sources: each method's file, and the configurations named below). On a CPU a run has some thousand steps of
128 images instead of hundreds of thousands: SGD for all but DINO, smaller heads and queues, and what was found by trial
(docs/reproductions/methods.md). Rates matter most: at a base rate of 0.3 SwAV hardly learns in this time, at 6 it does.
"""

from __future__ import annotations

SMALL_HEADS = ("--projector-hidden", "512")
# BYOL's and DINO's unlike views without their blur, which the CIFAR-10 recipe leaves out (Chen & He 2020, appendix D)
UNLIKE_VIEWS = ("--more-views", "count=1 blur-prob=0 solarize-prob=0.2")
# Of SwAV's and DINO's views, on a CPU, those of SimSiam; their own, with crops down to 8 and 14 %, are for long runs
SIMSIAM_VIEWS = ("--crop-scale", "0.2", "1.0", "--saturation", "0.4")
CPU_VIEWS: dict[str, tuple[str, ...]] = {
    "byol": UNLIKE_VIEWS,
    "swav": (*SIMSIAM_VIEWS, "--brightness", "0.4", "--contrast", "0.4", "--hue", "0.1"),
    "dino": (*SIMSIAM_VIEWS, "--more-views", "count=1"),
}

CPU_FLAGS: dict[str, tuple[str, ...]] = {
    "simsiam": (
        *("--projector-layers", "2", "--dim", "512", "--predictor-hidden", "128", *SMALL_HEADS),
        *("--base-lr", "1.0", "--weight-decay", "5e-4"),
    ),
    "simclr": (
        *("--projector-layers", "2", "--temperature", "0.2", *SMALL_HEADS),
        *("--base-lr", "2.0", "--weight-decay", "5e-4"),
    ),
    "moco-v2": (
        *("--queue", "2048", "--teacher-momentum", "0.99", "--temperature", "0.2", *SMALL_HEADS),
        *("--base-lr", "0.06", "--weight-decay", "1e-4"),
    ),
    "byol": (
        *("--predictor-hidden", "512", "--teacher-momentum", "0.95", *SMALL_HEADS),
        *("--base-lr", "3.0", "--weight-decay", "1e-4"),
    ),
    "swav": (
        *("--projector-layers", "2", "--prototypes", "64", "--freeze-prototypes", "0", "--epsilon", "0.02"),
        *(*SMALL_HEADS, "--base-lr", "6.0", "--weight-decay", "1e-4"),
    ),
    "dino": (
        *("--prototypes", "1024", "--dim", "128", "--head-hidden", "512", "--head-layers", "2", "--head-batch-norm"),
        *("--teacher-momentum", "0.95", "--freeze-prototypes", "0", "--clip-gradient", "0"),
        *("--optimizer", "adamw", "--base-lr", "5e-3", "--weight-decay", "0.04"),
    ),
}

LARS = ("--optimizer", "lars", "--weight-decay", "1e-6")
WARMUP_EPOCHS = 10  # of the papers' 100 epochs and more, for LARS and AdamW; a tenth of shorter runs
GPU_FLAGS: dict[str, tuple[str, ...]] = {
    "simsiam": (),
    "simclr": ("--base-lr", "0.3", *LARS),  # paper section 2.2
    "moco-v2": ("--base-lr", "0.03"),  # main_moco.py
    "byol": ("--base-lr", "0.45", *LARS),  # configs/byol.py, 100 epochs
    "swav": ("--base-lr", "0.3", "--lr-end", "0.001", *LARS),  # scripts/swav_400ep_2x224_pretrain.sh: 4.8 at 4096
    # main_dino.py
    "dino": ("--optimizer", "adamw", "--base-lr", "5e-4", "--weight-decay", "0.04", "--weight-decay-end", "0.4"),
}


def view_flags(method: str, image_size: int, on_cpu: bool) -> tuple[str, ...]:
    """Flags of a method's views of small images: no blur, which has nothing to hide at 32 px."""
    more = CPU_VIEWS.get(method, ()) if on_cpu else UNLIKE_VIEWS if method in ("byol", "dino") else ()
    return ("--image-size", str(image_size), "--blur-prob", "0", *more)


def method_flags(method: str, scale: str, epochs: int) -> tuple[str, ...]:
    """Flags of train/pretrain.py for a method in a run of ``epochs`` epochs; scale: cpu, gpu-small or gpu-large."""
    named = ("--method", method)
    if scale == "cpu":
        return (*named, "--backbone", "resnet_tiny", *view_flags(method, 32, on_cpu=True), *CPU_FLAGS[method])
    own = GPU_FLAGS[method]
    if "--optimizer" in own:
        own = (*own, "--warmup-epochs", f"{min(WARMUP_EPOCHS, epochs / 10):g}")
    if scale == "gpu-large":
        return (*named, "--backbone", "resnet50", *own)
    if method == "simsiam":
        own = ("--base-lr", "0.03", "--weight-decay", "5e-4", "--projector-layers", "2")  # appendix D
    return (*named, "--backbone", "resnet18", "--stem", "cifar", *view_flags(method, 32, on_cpu=False), *own)
