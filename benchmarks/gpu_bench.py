"""Shared by all parts of the GPU suite: sizes, time limit, device, and the file that receives the numbers."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from model.methods.simsiam import SimSiamConfig
from pipeline.common.errors import UserError
from pipeline.common.files import atomic_file
from pipeline.dataset.dataset import ShardSet
from pipeline.loader.config import LoaderConfig
from pipeline.sampling.views import ViewRecipe
from tools.common.gpu_monitor import GpuMonitor
from tools.throughput.report import StageResult
from tools.throughput.stages import Advance, Bench, Stage
from tools.throughput.timing import FEWEST_BATCHES, StageRunner, Trial
from tools.throughput.workload import ProfileConfig, build
from train.distributed.process_group import DistContext, distributed
from train.engine.run import Run
from train.optimization.optimizer import OptimConfig

WARM_STEPS = 3  # algorithms are chosen, code is compiled
NEEDS_GPU = "needs a GPU"
Precision = Literal["fp32", "tf32", "fp16", "bf16"]


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    model: SimSiamConfig
    image_size: int
    batches: tuple[int, ...]
    trial_s: float
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
    dist: DistContext
    watch: GpuMonitor
    results: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    longest_s: float | None = None  # of the attempts so far but the first, which is a cold start
    rates: dict[str, Any] = field(default_factory=dict)  # of the machine; empty: not looked at yet

    @staticmethod
    @contextmanager
    def open(data: Path, out: Path, toy: bool, name: str, end_s: float) -> Iterator[Suite]:
        """Take the device. Raises UserError if it is missing."""
        size = toy_or_real(toy)
        with distributed(size.device) as dist, GpuMonitor(dist.device) as watch:
            yield Suite(ShardSet.open(data), size, out, name, end_s, dist, watch)

    @property
    def left_s(self) -> float:
        """Seconds until the part has to end."""
        return self.end_s - time.perf_counter()

    def record(self, name: str, value: Any) -> None:
        self.note(name, value)
        print(f"{name}: {value}", flush=True)

    def note(self, name: str, value: Any) -> None:
        """The same without telling: what is known so far, in case the part is stopped. Whole or not at all."""
        self.results[name] = value
        text = json.dumps(self.results, indent=1, default=asdict)
        with atomic_file(self.out / f"part-{self.name}.json") as file:
            file.write(text.encode() + b"\n")

    def leave_out(self, names: Iterable[str]) -> None:
        """Record what a CPU cannot measure."""
        for name in names:
            self.record(name, {"skipped": NEEDS_GPU})

    def attempt(self, name: str, work: Callable[[], Any], needs_s: float = 0.0) -> None:
        """Record what ``work`` gives, or why it could not; only what is unexpected counts as a failure.

        It is not begun where fewer than ``needs_s`` seconds are left, or fewer than the longest attempt took. The first
        one does not count: it compiles and loads what all of them use.
        """
        needs_s = max(needs_s, self.longest_s or 0.0)
        if self.left_s < needs_s:
            self.record(name, {"skipped": f"{needs_s:.0f} s were not left"})
            return
        start_s = time.perf_counter()
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
        self.longest_s = 0.0 if self.longest_s is None else max(self.longest_s, time.perf_counter() - start_s)

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
            # Otherwise the second batch size of a process would be compiled for any size.
            parallel: Any = torch.compile(run.model, backend=self.size.compiler, dynamic=False)
            run = replace(run, parallel=parallel, config=replace(run.config, compile=True))
        return bench, run

    def run_stages(
        self, stages: dict[str, Stage], bench: Bench, note: Callable[[dict[str, StageResult]], None]
    ) -> dict[str, list[Trial]]:
        """Time the stages as often as there is time for; ``note`` receives all results so far after each trial."""
        trials: dict[str, list[Trial]] = {}

        def add(name: str, trial: Trial) -> None:
            trials.setdefault(name, []).append(trial)
            note({name: StageResult.of(of) for name, of in trials.items()})

        runner = StageRunner(self.size.trial_s, self.watch, bench.tidy)
        return runner.run(stages, self.size.repeats, add, self.end_s)

    def stretches(self, advance: Advance, batch: int) -> list[Trial]:
        """Timed stretches of one stage that stays open, after a warm-up."""
        runner = StageRunner(self.size.trial_s, self.watch, lambda: None)
        advance(WARM_STEPS)
        first = runner.timed(advance, batch, FEWEST_BATCHES)
        count = max(FEWEST_BATCHES, round(self.size.trial_s / first.wall_s * FEWEST_BATCHES))
        return [runner.timed(advance, batch, count) for _ in range(self.size.repeats)]


@contextmanager
def number_format(precision: Precision) -> Iterator[None]:
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
