"""The GPU suite's parts, and the measurement of all stages. A part writes each number as soon as it has it."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable
from dataclasses import dataclass, replace

from gpu_bench import Suite
from gpu_images import decode, loader, parity
from gpu_launches import cuda_graph, launches
from gpu_official import official
from gpu_roofline import roofline, step_limits
from gpu_steps import compiled, model

from tools.throughput.report import StageResult, as_json, describe, draw_stages, judge, table
from tools.throughput.stages import Stage, make_stages, model_step
from tools.throughput.workload import setting_of, subtitle


def stages(suite: Suite) -> None:
    """All stages, eager, at the largest batch."""
    _stages(suite, compiled=False)


def stages_compiled(suite: Suite) -> None:
    """The upper stages with the compiled model, which asks more of the loader."""
    _stages(suite, compiled=True)


def _stages(suite: Suite, compiled: bool) -> None:
    bench, run = suite.set_up(suite.size.batches[-1], compiled=compiled)
    run.model.train()
    every: dict[str, Stage] = {str(name): stage for name, stage in make_stages(bench, run).items()}
    views = bench.resident_views()
    suite.attempt("roofline", lambda: step_limits(suite, run, views))
    every["model"] = replace(every["model"], open=lambda: model_step(bench, run, views))
    upper = ("model", "end_to_end", "loader")  # first, in case there is no time for all
    stages = {name: every[name] for name in (upper if compiled else dict.fromkeys((*upper, *every)))}
    trials = suite.run_stages(stages, bench, lambda results: suite.note("stages", results))
    trials = {name: trials[name] for name in every if name in trials}
    results = {name: StageResult.of(of) for name, of in trials.items()}
    verdict = judge(results, trials, setting_of(bench, run))
    print(table(results))
    print(describe(verdict))
    for name, value in as_json(results, verdict).items():
        suite.record(name, value)
    file = "stages-compiled.png" if compiled else "stages.png"
    draw_stages(results, verdict, subtitle(bench, run)).savefig(suite.out / file, dpi=130)


@dataclass(frozen=True)
class Part:
    """One part, and how long it may take with its start."""

    work: Callable[[Suite], None]
    seconds: float


# Together no more than gpu_suite.py's --minutes, so that every part begins. What matters most comes first.
PARTS = {
    "parity": Part(parity, 45),
    "roofline": Part(roofline, 30),
    "stages": Part(stages, 95),
    "official": Part(official, 50),
    "stages-compiled": Part(stages_compiled, 105),
    "cuda-graph": Part(cuda_graph, 60),
    "model": Part(model, 60),
    "decode": Part(decode, 40),
    "compiled": Part(compiled, 40),
    "loader": Part(loader, 27),
}
# and what is run only when asked for by name, as scripts/gpu_session.sh check does
EVERY_PART = ChainMap({"launches": Part(launches, 60)}, PARTS)
