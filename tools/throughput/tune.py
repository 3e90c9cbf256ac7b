"""Search for the loader's fastest settings on this machine: profile_throughput.py --tune.

One question after the other (where to decode, threads, queues), each answered by end-to-end training, since loader and
model compete for the GPU and the cores. A setting changes only for a gain of 1 %, compared round by round. The result
is printed as flags for train/pretrain.py.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch

from pipeline.backends.select import choose_backend
from pipeline.common.errors import UserError
from pipeline.loader.config import LoaderConfig
from tools.common.gpu_monitor import GpuMonitor
from tools.common.measuring import Spread
from tools.throughput.stages import Bench, Stage, make_stages
from tools.throughput.timing import StageRunner, Trial
from train.engine.run import Run

TRIAL_S = 1.5
FEWEST_ROUNDS, MOST_ROUNDS = 3, 7
GAIN = 1.01  # a setting must be better by so much, or the present one stays
FINAL_SHARE = 0.25  # of the budget: default against winner
HW_LOADS = (0.0, 0.25, 0.5, 0.65, 0.8, 1.0)
QUEUES = ((1, 1, 2), (2, 2, 4), (3, 2, 6), (4, 3, 8))  # --prefetch, --dali.prefetch, --read-ahead
PRESENT = "as it is"


def tune(bench: Bench, run: Run, budget_s: float) -> LoaderConfig:
    """Search for at most about ``budget_s`` seconds; print the trials and the flags of the winner, and return it.

    Raises UserError if the time is too short for a comparison.
    """
    start_s = time.perf_counter()
    given = replace(bench.loader, threads=bench.threads)
    best, questions = given, _questions(bench)
    with GpuMonitor(bench.device) as monitor:
        runner = StageRunner(TRIAL_S, monitor, bench.tidy)
        for number, question in enumerate(questions):
            answers = {label: config for label, config in candidates(question, best).items() if config != best}
            left_s = budget_s * (1 - FINAL_SHARE) - (time.perf_counter() - start_s)
            if left_s <= 0:
                break
            end_s = time.perf_counter() + left_s / (len(questions) - number)
            trials = _compare(bench, run, runner, {PRESENT: best, **answers}, end_s)
            chosen = choose(trials)
            print(_describe(question, trials, chosen), flush=True)
            best = {PRESENT: best, **answers}[chosen]
        final = _compare(bench, run, runner, {"default": given, "winner": best}, start_s + budget_s)
    if any(len(trials) < FEWEST_ROUNDS for trials in final.values()):
        raise UserError(
            f"--budget {budget_s / 60:g} minutes are too few to compare anything {FEWEST_ROUNDS} times here: "
            "allow more, or lower --batch"
        )
    print(_describe("default against winner", final, "winner"))
    pairs = zip(final["default"], final["winner"], strict=True)
    gain = Spread.of([winner.img_per_s / default.img_per_s for default, winner in pairs])
    print(f"the winner is {gain} times as fast end to end\nflags for pretrain.py: {flags_of(best)}")
    return best


def _questions(bench: Bench) -> list[str]:
    decodes_on_gpu = bench.device.type == "cuda" and choose_backend(bench.loader.backend)[0] == "dali"
    return [*(["where to decode"] if decodes_on_gpu else []), "threads", "queues"]


def candidates(question: str, best: LoaderConfig) -> dict[str, LoaderConfig]:
    """Settings that may answer a question, each by its label; all other settings as in ``best``."""
    match question:
        case "where to decode":
            mixed = {f"mixed, hardware load {load:g}": _dali(best, "mixed", load) for load in HW_LOADS}
            return {**mixed, "CPU": _dali(best, "cpu", best.dali.hw_decoder_load)}
        case "threads":
            now = best.threads
            counts = {max(1, now // 4), max(1, now // 2), max(1, now * 3 // 4), now + max(1, now // 2)}
            return {f"{count} threads": replace(best, threads=count) for count in sorted(counts)}
        case "queues":
            return {
                f"prefetch {ready}, DALI's {own}, read ahead {read}": replace(
                    best, prefetch=ready, read_ahead=read, dali=replace(best.dali, prefetch=own)
                )
                for ready, own, read in QUEUES
            }
    raise AssertionError(question)


def _dali(config: LoaderConfig, decoder: Literal["mixed", "cpu"], load: float) -> LoaderConfig:
    return replace(config, dali=replace(config.dali, decoder=decoder, hw_decoder_load=load))


def _compare(
    bench: Bench, run: Run, runner: StageRunner, configs: Mapping[str, LoaderConfig], end_s: float
) -> dict[str, list[Trial]]:
    """End-to-end trials of each setting in turn; none of a setting that the GPU's memory is too small for."""
    stages: dict[str, Stage] = {}
    for label, config in configs.items():
        stage = make_stages(replace(bench, loader=config), run)["end_to_end"]
        try:
            runner.trial(label, stage)
            stages[label] = stage
        except torch.OutOfMemoryError:
            print(f"  {label}: out of GPU memory", flush=True)
    return runner.run(stages, MOST_ROUNDS, end_s=end_s)


def choose(trials: Mapping[str, list[Trial]]) -> str:
    """Label of the best setting; PRESENT unless another gains clearly, over at least FEWEST_ROUNDS rounds."""
    present = trials.get(PRESENT, [])
    decided = {label: seen for label, seen in trials.items() if len(seen) >= FEWEST_ROUNDS}
    if len(present) < FEWEST_ROUNDS:
        return PRESENT
    best = max(decided, key=lambda label: statistics.median(trial.img_per_s for trial in decided[label]))
    pairs = zip(decided[best], present, strict=False)
    gain = statistics.median(after.img_per_s / before.img_per_s for after, before in pairs)
    return best if gain >= GAIN else PRESENT


def flags_of(loader: LoaderConfig) -> str:
    """The flags of train/pretrain.py that give the tuned settings of ``loader``."""
    own = {name: getattr(loader, name) for name in ("threads", "prefetch", "read_ahead")}
    dali = {f"dali.{name}": getattr(loader.dali, name) for name in ("decoder", "hw_decoder_load", "prefetch")}
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in {**own, **dali}.items())


def _describe(question: str, trials: Mapping[str, list[Trial]], chosen: str) -> str:
    lines = [f"{question}:"]
    for label, seen in trials.items():
        rate = str(Spread.of([trial.img_per_s for trial in seen])) if seen else "no time"
        mark = " <- chosen" if label == chosen else ""
        lines.append(f"  {label:44} {rate:>28} images/s in {len(seen)} trials{mark}")
    return "\n".join(lines)
