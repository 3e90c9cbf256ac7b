"""Owns the list of the GPU suite's parts, and the ladder among them. Each part writes down every number at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from gpu_bench import Suite
from gpu_images import decode, loader, parity
from gpu_official import official
from gpu_steps import compiled, model

from tools.throughput.report import RungResult, as_json, describe, draw_ladder, judge, table
from tools.throughput.stages import Rung, make_ladder, model_step
from tools.throughput.workload import setting_of, subtitle


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
class Part:
    """One part, and how long it may take with its start."""

    work: Callable[[Suite], None]
    seconds: float


PARTS = {
    "parity": Part(parity, 45),
    "ladder": Part(ladder, 105),
    "official": Part(official, 65),
    "ladder-compiled": Part(ladder_compiled, 150),
    "model": Part(model, 100),
    "decode": Part(decode, 65),
    "compiled": Part(compiled, 100),
    "loader": Part(loader, 60),
}
