"""Owns the parts of the GPU suite: what each measures. Every part writes down each number as soon as it has it."""

from __future__ import annotations

import gc
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from loader_vs_official import official_loader, write_folder
from torch import Tensor

from model.simsiam import SimSiamConfig
from pipeline.delivery import share_of_cores
from pipeline.disk import atomic_file
from pipeline.errors import UserError
from pipeline.loader import Views, open_views
from pipeline.loader_config import DaliConfig, LoaderConfig
from pipeline.shards import ShardSet
from pipeline.views import ViewRecipe
from tools.gpu_watch import GpuWatch
from tools.ladder import Advance, Bench, Rung, make_ladder, model_step
from tools.ladder_plot import draw_ladder
from tools.ladder_report import RungResult, as_json, describe, judge, table
from tools.profile_throughput import ProfileConfig, build, setting_of, subtitle
from tools.turns import FEWEST_BATCHES, Climber, Turn
from train.dist import Dist, distributed
from train.optim import OptimConfig, parameter_groups
from train.pretrain import train_step
from train.run import Run
from train.step_guard import StepGuard

Precision = Literal["fp32", "tf32", "fp16", "bf16"]
PARITY_SAMPLES = 64
OFFICIAL_PICTURES = 1000
HW_LOADS = (0.65, 0.0, 1.0)  # profile_throughput.py --tune tries more of them
WARM_STEPS = 3  # algorithms are chosen, code is compiled


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    model: SimSiamConfig
    image_size: int
    batches: tuple[int, ...]
    turn_s: float
    repeats: int
    compiler: str  # torch.compile's back end
    device: Literal["cuda", "cpu"]
    epoch_batches: int  # of the official loader, whose workers start afresh with each epoch
    most_compiled: int  # variants


REAL = Size(SimSiamConfig(), 224, (256, 512), 1.5, 3, "inductor", "cuda", 64, 6)
TOY = Size(
    SimSiamConfig(backbone="resnet_tiny", dim=16, projector_hidden=16, predictor_hidden=4),
    16,
    (4, 8),
    0.02,
    3,
    "eager",
    "cpu",
    8,
    1,
)


def toy_or_real(toy: bool) -> Size:
    """The size of a suite."""
    return TOY if toy else REAL


@dataclass
class Suite:
    """One part's surroundings: data, device, clock, and where its numbers go."""

    dataset: ShardSet
    size: Size
    out: Path
    name: str
    end_s: float  # time.perf_counter
    dist: Dist
    watch: GpuWatch
    results: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    stack: ExitStack = field(default_factory=ExitStack)

    @staticmethod
    def open(data: Path, out: Path, toy: bool, name: str, end_s: float) -> Suite:
        """Take the device. Raises UserError if it is missing."""
        stack, size = ExitStack(), toy_or_real(toy)
        dist = stack.enter_context(distributed(size.device))
        watch = stack.enter_context(GpuWatch(dist.device))
        return Suite(ShardSet.open(data), size, out, name, end_s, dist, watch, stack=stack)

    def __enter__(self) -> Suite:
        """Use as a context."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the device."""
        self.stack.close()

    @property
    def left_s(self) -> float:
        """Seconds until the part has to end."""
        return self.end_s - time.perf_counter()

    def record(self, name: str, value: Any) -> None:
        """Write a number down at once."""
        self.note(name, value)
        print(f"{name}: {value}", flush=True)

    def note(self, name: str, value: Any) -> None:
        """The same without telling: what is known so far, in case the part is stopped. Whole or not at all."""
        self.results[name] = value
        text = json.dumps(self.results, indent=1, default=asdict)
        with atomic_file(self.out / f"part-{self.name}.json") as file:
            file.write(text.encode() + b"\n")

    def attempt(self, name: str, work: Callable[[], Any], needs_s: float = 0.0) -> None:
        """Record what ``work`` gives, or why it could not; only what is unexpected counts as a failure."""
        if self.left_s < needs_s:
            self.record(name, {"skipped": f"{needs_s:.0f} s were not left"})
            return
        try:
            self.record(name, work())
        except torch.OutOfMemoryError:
            self.record(name, {"skipped": "out of GPU memory"})
        except UserError as error:  # what this machine lacks: Apex, for instance
            self.record(name, {"skipped": str(error)})
        except Exception as error:  # noqa: BLE001  recorded, and the part fails at its end
            self.record(name, {"failed": f"{type(error).__name__}: {error}"})
            self.failures.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        gc.collect()
        if self.dist.device.type == "cuda":
            torch.cuda.empty_cache()

    def set_up(
        self,
        batch: int,
        *,
        precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
        loader: LoaderConfig | None = None,
        optimizer: Literal["auto", "apex", "fused", "foreach"] = "auto",
        compiled: bool = False,
    ) -> tuple[Bench, Run]:
        """The bench and the run of one setting, as pretrain.py would have them."""
        config = ProfileConfig(
            data=str(self.dataset.path),
            batch=batch,
            device=self.size.device,
            precision=precision,
            model=self.size.model,
            views=ViewRecipe(image_size=self.size.image_size),
            loader=loader or LoaderConfig(),
            optim=OptimConfig(optimizer=optimizer),
        )
        bench, run = build(config, self.dataset, self.dist)
        if compiled:
            parallel: Any = torch.compile(run.model, backend=self.size.compiler)
            run = replace(run, parallel=parallel, config=replace(run.config, compile=True))
        return bench, run

    def climb(
        self, rungs: dict[str, Rung], bench: Bench, note: Callable[[dict[str, RungResult]], None]
    ) -> dict[str, list[Turn]]:
        """Turns of rungs, as many as there is time for; ``note`` hears after each what is known by then."""
        turns: dict[str, list[Turn]] = {}

        def tell(name: str, turn: Turn) -> None:
            turns.setdefault(name, []).append(turn)
            note({name: RungResult.of(of) for name, of in turns.items()})

        climber = Climber(self.size.turn_s, self.watch, bench.tidy)
        return climber.climb(rungs, self.size.repeats, tell, self.end_s)

    def stretches(self, advance: Advance, batch: int) -> list[Turn]:
        """Timed stretches of one rung that stays open, after a warm-up."""
        climber = Climber(self.size.turn_s, self.watch, lambda: None)
        advance(WARM_STEPS)
        first = climber.timed(advance, batch, FEWEST_BATCHES)
        count = max(FEWEST_BATCHES, round(self.size.turn_s / first.wall_s * FEWEST_BATCHES))
        return [climber.timed(advance, batch, count) for _ in range(self.size.repeats)]


def parity(suite: Suite) -> None:
    """The device's views against torchvision's on the CPU, in 255ths, with and without what is known to differ."""
    side = suite.size.image_size
    plain = ViewRecipe(image_size=side, blur_prob=0.0, jitter_prob=0.0, gray_prob=0.0)
    cases = {
        "whole recipe": (ViewRecipe(image_size=side), DaliConfig()),
        "without blur": (ViewRecipe(image_size=side, blur_prob=0.0), DaliConfig()),
        "crop and flip alone": (plain, DaliConfig()),
    }
    if suite.dist.device.type == "cuda":
        for name, decoder in decoders().items():
            cases[f"crop and flip alone, {name}"] = (plain, decoder)
    for name, (recipe, decoder) in cases.items():
        suite.attempt(name, lambda recipe=recipe, decoder=decoder: _difference(suite, recipe, decoder))


def _difference(suite: Suite, recipe: ViewRecipe, decoder: DaliConfig) -> dict[str, float]:
    samples = min(PARITY_SAMPLES, suite.dataset.num_samples)

    def views(backend: Literal["dali", "torchvision"], device: torch.device) -> Tensor:
        with open_views(
            suite.dataset,
            recipe,
            LoaderConfig(backend=backend, dali=decoder),
            seed=0,
            global_batch=samples,
            epochs=1,
            rank=0,
            world_size=1,
            local_world_size=1,
            device=device,
        ) as batches:
            both = next(batches)
            std = torch.tensor(recipe.std)[:, None, None]
            return torch.stack([both.x1, both.x2]).float().cpu() * std * 255

    apart = (views("dali", suite.dist.device) - views("torchvision", torch.device("cpu"))).abs()
    values = apart.flatten().numpy()
    return {
        "mean": float(values.mean()),
        "max": float(values.max()),
        "p99": float(np.percentile(values, 99)),
        "within_4": float((values <= 4.0).mean()),
    }


def decoders() -> dict[str, DaliConfig]:
    """How pictures may be decoded where there is a GPU."""
    mixed = {f"mixed, hardware load {load:g}": DaliConfig(hw_decoder_load=load) for load in HW_LOADS}
    repeated = DaliConfig(hw_decoder_load=HW_LOADS[0], smooth_chroma=False)
    return {**mixed, "CPU": DaliConfig(decoder="cpu"), "mixed, colours repeated": repeated}


def placements(suite: Suite) -> dict[str, LoaderConfig]:
    """Where pictures may be decoded."""
    known = decoders() if suite.dist.device.type == "cuda" else {"CPU": DaliConfig()}
    return {name: LoaderConfig(dali=dali) for name, dali in known.items()}


def decode(suite: Suite) -> None:
    """Decode alone, by placement."""
    _by_placement(suite, "decode", suite.size.batches[0])


def loader(suite: Suite) -> None:
    """The whole loader, by placement."""
    _by_placement(suite, "loader", suite.size.batches[-1])


def _by_placement(suite: Suite, rung: Literal["decode", "loader"], batch: int) -> None:
    bench, _ = suite.set_up(batch)
    rungs = {name: make_ladder(replace(bench, loader=config), None)[rung] for name, config in placements(suite).items()}

    def note(results: dict[str, RungResult]) -> None:
        for name, result in results.items():
            suite.note(name, result)

    for name, turns in suite.climb(rungs, bench, note).items():
        suite.record(name, RungResult.of(turns))


def ladder(suite: Suite) -> None:
    """All rungs, eager, at the largest batch."""
    _ladder(suite, compiled=False)


def ladder_compiled(suite: Suite) -> None:
    """The upper rungs with the compiled model, which asks more of the loader."""
    _ladder(suite, compiled=True)


def _ladder(suite: Suite, compiled: bool) -> None:
    bench, run = suite.set_up(suite.size.batches[-1], compiled=compiled)
    run.model.train()
    every: dict[str, Rung] = {str(name): rung for name, rung in make_ladder(bench, run).items()}
    views = bench.resident_views()
    every["model"] = replace(every["model"], open=lambda: model_step(bench, run, views))
    upper = ("model", "end_to_end", "loader")  # first, in case there is no time for all
    rungs = {name: every[name] for name in (upper if compiled else dict.fromkeys((*upper, *every)))}
    turns = suite.climb(rungs, bench, lambda results: suite.note("rungs", results))
    turns = {name: turns[name] for name in every if name in turns}
    results = {name: RungResult.of(of) for name, of in turns.items()}
    verdict = judge(results, turns, setting_of(bench, run))
    print(table(results))
    print(describe(verdict))
    for name, value in as_json(results, verdict).items():
        suite.record(name, value)
    file = "ladder-compiled.png" if compiled else "ladder.png"
    draw_ladder(results, verdict, subtitle(bench, run)).savefig(suite.out / file, dpi=130)


@dataclass(frozen=True)
class Variant:
    """One way to compute a step."""

    batch: int
    precision: Precision = "bf16"
    layout: Literal["channels_last", "contiguous"] = "channels_last"
    compiled: bool = False
    optimizer: Literal["apex", "fused", "foreach", "one by one"] = "fused"

    def __str__(self) -> str:
        """For tables."""
        how = "compiled" if self.compiled else "eager"
        return f"batch {self.batch}, {self.precision}, {self.layout}, {how}, SGD {self.optimizer}"


def model(suite: Suite) -> None:
    """The step alone, eager: precision, layout, batch, and how SGD is implemented. What matters most comes first."""
    small, large = suite.size.batches
    precisions: tuple[Precision, ...] = ("bf16", "fp16", "tf32", "fp32")
    variants = [
        *(Variant(large, precision) for precision in precisions),
        *(Variant(large, optimizer=optimizer) for optimizer in ("apex", "foreach", "one by one")),
        *(Variant(small, precision) for precision in precisions),
        *(Variant(large, precision, "contiguous") for precision in precisions),
        *(Variant(small, precision, "contiguous") for precision in precisions),
    ]
    _steps(suite, variants, needs_s=8)


def compiled(suite: Suite) -> None:
    """The step alone, compiled: the likeliest settings first, since each takes most of a minute to compile."""
    small, large = suite.size.batches
    variants = [
        Variant(small, compiled=True),
        Variant(large, compiled=True),
        Variant(large, "fp16", compiled=True),
        Variant(large, "tf32", compiled=True),
        Variant(large, layout="contiguous", compiled=True),
        Variant(large, "fp32", compiled=True),
    ]
    _steps(suite, variants[: suite.size.most_compiled], needs_s=40)


def _steps(suite: Suite, variants: list[Variant], needs_s: float) -> None:
    """Measure each, on the same views."""
    on_gpu = suite.dist.device.type == "cuda"
    bench, _ = suite.set_up(suite.size.batches[-1])
    views = bench.resident_views()
    for variant in variants:
        if not on_gpu and (variant.precision in ("fp16", "tf32") or variant.optimizer == "apex"):
            suite.record(str(variant), {"skipped": "needs a GPU"})
            continue
        measure = partial(_measure_step, suite, variant, views)
        suite.attempt(str(variant), measure, needs_s if on_gpu else 0.0)


def _measure_step(suite: Suite, variant: Variant, views: list[Views]) -> dict[str, Any]:
    bench, run = suite.set_up(
        variant.batch,
        precision="fp32" if variant.precision == "tf32" else variant.precision,
        optimizer="foreach" if variant.optimizer == "one by one" else variant.optimizer,
        compiled=variant.compiled,
    )
    if variant.optimizer == "one by one":
        run = with_plain_sgd(run, foreach=False)
    if variant.layout == "contiguous":
        make_contiguous(run)
    run.model.train()
    seen = [_cut(view, variant, bench.dtype) for view in views]
    with _number_format(variant.precision), model_step(bench, run, seen) as advance:
        turns = suite.stretches(advance, bench.batch)
    memory = torch.cuda.max_memory_allocated() / 2**30 if suite.dist.device.type == "cuda" else None
    return {**asdict(RungResult.of(turns)), "torch_memory_gib": memory}


def _cut(views: Views, variant: Variant, dtype: torch.dtype) -> Views:
    """The views in a variant's size, number format and layout."""
    layout = torch.contiguous_format if variant.layout == "contiguous" else torch.channels_last
    x1, x2 = (x[: variant.batch].to(dtype).contiguous(memory_format=layout) for x in (views.x1, views.x2))
    return replace(views, x1=x1, x2=x2, ids=views.ids[: variant.batch], sources=views.sources[: variant.batch])


def make_contiguous(run: Run) -> None:
    """Put weights and momentum in torch's default layout: fused kernels want them alike."""
    run.model.to(memory_format=torch.contiguous_format)
    for weight, state in run.optimizer.state.items():
        if "momentum_buffer" in state:
            state["momentum_buffer"] = torch.zeros_like(weight)


def with_plain_sgd(run: Run, foreach: bool | None) -> Run:
    """The run with torch's SGD: not fused; ``foreach`` None is torch's own choice."""
    options = run.config.optim
    groups = parameter_groups(options, run.model)
    sgd = torch.optim.SGD(
        groups,
        lr=run.plan.schedule.peak_lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        foreach=foreach,
        fused=False,
    )
    return replace(run, optimizer=sgd, guard=StepGuard(run.model, sgd, run.dist.device))


@contextmanager
def _number_format(precision: Precision) -> Iterator[None]:
    """Products of float32 in TF32 or not, for as long as the context lasts."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def official(suite: Suite) -> None:
    """The yardstick: the official recipe with PIL, float32, contiguous, unfused SGD, as many workers as cores."""
    suite.attempt("official, end to end", lambda: _measure_official(suite))


def _measure_official(suite: Suite) -> dict[str, Any]:
    batch = suite.size.batches[0]
    bench, run = suite.set_up(batch, precision="fp32", optimizer="foreach")
    run = with_plain_sgd(run, foreach=None)
    make_contiguous(run)
    run.model.train()
    folder = Path(tempfile.mkdtemp(prefix="official-"))
    try:
        _fill_folder(suite, batch, folder)
        with _number_format("fp32"), _official_steps(suite, run, folder, batch) as advance:
            advance(2)  # workers start, algorithms are chosen
            climber = Climber(suite.size.turn_s, suite.watch, bench.tidy)
            count = max(4, round(16 * 1024 / batch / 4)) if suite.size.device == "cuda" else 2
            turns: list[Turn] = []
            for _ in range(suite.size.repeats):
                turns.append(climber.timed(advance, batch, count))
                suite.note("official, end to end", _official_result(turns, batch))
    finally:
        shutil.rmtree(folder)
    return _official_result(turns, batch)


def _official_result(turns: list[Turn], batch: int) -> dict[str, Any]:
    return {**asdict(RungResult.of(turns)), "batch": batch, "workers": share_of_cores(1)}


def _fill_folder(suite: Suite, batch: int, folder: Path) -> None:
    """Some pictures, linked to under many names: an epoch must keep all workers busy for long."""
    pictures = min(OFFICIAL_PICTURES, suite.dataset.num_samples)
    write_folder(suite.dataset, pictures, folder)
    files = sorted((folder / "class").iterdir())
    for number in range(pictures, suite.size.epoch_batches * batch):
        os.link(files[number % pictures], folder / "class" / f"{number:06d}.jpg")


@contextmanager
def _official_steps(suite: Suite, run: Run, folder: Path, batch: int) -> Iterator[Advance]:
    workers = share_of_cores(1)
    loader = official_loader(folder, ViewRecipe(image_size=suite.size.image_size), batch, workers)
    device = suite.dist.device
    loader.pin_memory = device.type == "cuda"  # as the official script asks for

    def views() -> Iterator[Views]:
        while True:
            for (x1, x2), _ in loader:
                on_device = (x.to(device, non_blocking=True) for x in (x1, x2))
                yield Views(*on_device, np.zeros(batch, np.int64), np.zeros(batch, np.int64), 0, 0, 0.0)

    batches = views()

    def advance(count: int) -> dict[str, float]:
        for _ in range(count):
            train_step(run, batches)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        return {}

    try:
        yield advance
    finally:
        batches.close()


@dataclass(frozen=True)
class Part:
    """One part, and how long it may take with its start."""

    work: Callable[[Suite], None]
    seconds: float


PARTS = {
    "parity": Part(parity, 45),
    "ladder": Part(ladder, 105),
    "official": Part(official, 65),
    "ladder-compiled": Part(ladder_compiled, 125),
    "model": Part(model, 100),
    "decode": Part(decode, 65),
    "compiled": Part(compiled, 100),
    "loader": Part(loader, 60),
}
