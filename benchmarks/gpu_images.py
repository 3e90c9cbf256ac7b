"""The GPU suite's parts about images: parity with torchvision, decoding and loading by placement."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from gpu_bench import Suite
from torch import Tensor

from pipeline.backends.base import DaliConfig
from pipeline.loader.config import LoaderConfig
from pipeline.loader.loader import open_views
from pipeline.sampling.sampler import BatchSampler, World
from pipeline.sampling.views import ViewRecipe
from tools.throughput.report import StageResult
from tools.throughput.stages import make_stages

PARITY_SAMPLES = 64
HW_LOADS = (0.65, 0.0, 1.0)  # profile_throughput.py --tune tries more of them


def parity(suite: Suite) -> None:
    """The device's views against torchvision's on the CPU, in 255ths, with and without what is known to differ."""
    side = suite.size.image_size
    plain = ViewRecipe(image_size=side, blur_prob=0.0, jitter_prob=0.0, gray_prob=0.0)
    cases = {
        "whole recipe": (ViewRecipe(image_size=side), DaliConfig()),
        "without blur": (ViewRecipe(image_size=side, blur_prob=0.0), DaliConfig()),
        "crop and flip alone": (plain, DaliConfig()),
    }
    by_decoder = {f"crop and flip alone, {name}": decoder for name, decoder in decoders().items()}
    if suite.dist.device.type == "cuda":
        cases |= {name: (plain, decoder) for name, decoder in by_decoder.items()}
    else:
        suite.leave_out(by_decoder)
    for name, (recipe, decoder) in cases.items():
        suite.attempt(name, lambda recipe=recipe, decoder=decoder: _difference(suite, recipe, decoder))


def _difference(suite: Suite, recipe: ViewRecipe, decoder: DaliConfig) -> dict[str, float]:
    samples = min(PARITY_SAMPLES, suite.dataset.num_samples)

    def views(backend: Literal["dali", "torchvision"], device: torch.device) -> Tensor:
        with open_views(
            suite.dataset,
            recipe,
            LoaderConfig(backend=backend, dali=decoder),
            BatchSampler(seed=0, global_batch=samples, epochs=1),
            World.alone(device),
        ) as batches:
            both = next(batches)
            std = torch.tensor(recipe.std)[:, None, None]
            return torch.stack(both.views).float().cpu() * std * 255

    apart = (views("dali", suite.dist.device) - views("torchvision", torch.device("cpu"))).abs()
    values = apart.flatten().numpy()
    return {
        "mean": float(values.mean()),
        "max": float(values.max()),
        "p99": float(np.percentile(values, 99)),
        "within_4": float((values <= 4.0).mean()),
    }


def decoders() -> dict[str, DaliConfig]:
    """How images may be decoded where there is a GPU."""
    mixed = {f"mixed, hardware load {load:g}": DaliConfig(hw_decoder_load=load) for load in HW_LOADS}
    # Whether the hardware decoder takes part at all where colours are interpolated: the same loads without.
    repeated = {
        f"mixed, hardware load {load:g}, colours repeated": DaliConfig(hw_decoder_load=load, smooth_chroma=False)
        for load in (HW_LOADS[0], 1.0)
    }
    return {**mixed, "CPU": DaliConfig(decoder="cpu"), **repeated}


def placements(suite: Suite) -> dict[str, LoaderConfig]:
    """Where images may be decoded."""
    known = {**decoders(), "mixed, 4000 px set aside": DaliConfig(preallocate_side=4000)}
    if suite.dist.device.type == "cpu":
        suite.leave_out(name for name in known if name != "CPU")
        known = {"CPU": DaliConfig()}
    return {name: LoaderConfig(dali=dali) for name, dali in known.items()}


def decode(suite: Suite) -> None:
    """Decode alone, by placement."""
    _by_placement(suite, "decode", suite.size.batches[0])


def loader(suite: Suite) -> None:
    """The whole loader, by placement."""
    _by_placement(suite, "loader", suite.size.batches[-1])


def _by_placement(suite: Suite, stage: Literal["decode", "loader"], batch: int) -> None:
    bench, _ = suite.set_up(batch)
    stages = {
        name: make_stages(replace(bench, loader=config), None)[stage] for name, config in placements(suite).items()
    }

    def note(results: dict[str, StageResult]) -> None:
        for name, result in results.items():
            suite.note(name, result)

    for name, trials in suite.run_stages(stages, bench, note).items():
        suite.record(name, StageResult.of(trials))
