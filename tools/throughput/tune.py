"""Owns the search for the loader's best settings on this machine: one question after the other, each answered in turns.

What counts is end to end, since the loader and the model compete for the GPU and the cores. A setting is changed only
for a gain that shows turn by turn; where nothing gains, the default stays.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.backends.select import choose_backend
from pipeline.common.errors import UserError
from pipeline.loader.config import LoaderConfig
from tools.common.gpu_monitor import GpuWatch
from tools.common.measuring import Spread, machine
from tools.throughput.stages import Bench, Rung, make_ladder
from tools.throughput.timing import Climber, Turn
from train.config.loader_tuning import LoaderTuning, save_tuning, settings_of
from train.engine.run import Run

TURN_S = 1.5
FEWEST_ROUNDS, MOST_ROUNDS = 3, 7
GAIN = 1.01  # a setting must be better by so much, or the one before stays
FINAL_SHARE = 0.25  # of the budget: default against winner
HW_LOADS = (0.0, 0.25, 0.5, 0.65, 0.8, 1.0)
QUEUES = ((1, 1, 2), (2, 2, 4), (3, 2, 6), (4, 3, 8))  # finished batches, DALI's own, read ahead


@dataclass(frozen=True)
class Candidate:
    """One setting that is tried."""

    label: str
    loader: LoaderConfig
    batch: int


@dataclass
class Trial:
    """What was seen of a candidate."""

    candidate: Candidate
    turns: list[Turn] = field(default_factory=list)
    failure: str | None = None

    @property
    def median(self) -> float:
        """Images/s; 0 before the first turn."""
        return statistics.median(turn.img_per_s for turn in self.turns) if self.turns else 0.0

    def as_json(self) -> dict[str, Any]:
        """For the evidence."""
        spread = asdict(Spread.of([turn.img_per_s for turn in self.turns])) if self.turns else None
        return {"setting": self.candidate.label, "img_per_s": spread, "failure": self.failure}


def tune(bench: Bench, run: Run, *, budget_s: float, with_batch: bool, file: Path) -> LoaderTuning:
    """Search for at most about ``budget_s`` seconds, print the evidence and write ``file``.

    ``with_batch``: also try other batches; what is best is printed, and the file keeps to the loader's settings.
    Raises UserError if nothing could be decided in the time.
    """
    start_s = time.perf_counter()
    base = Candidate("as given", replace(bench.loader, threads=bench.threads), bench.batch)
    questions = _questions(bench, with_batch)
    best, evidence = base, []
    with GpuWatch(bench.device) as watch:
        search = _Search(bench, run, Climber(TURN_S, watch, bench.tidy))
        for number, (question, candidates) in enumerate(questions):
            left_s = budget_s * (1 - FINAL_SHARE) - (time.perf_counter() - start_s)
            trials = search.compare([best, *candidates(best)], left_s / (len(questions) - number))
            winner = choose(trials)
            print(_describe(question, trials, winner), flush=True)
            evidence.append({"question": question, "trials": [t.as_json() for t in trials], "chosen": winner.label})
            best = winner
        left_s = budget_s - (time.perf_counter() - start_s)
        final = search.compare([replace(base, label="default"), replace(best, label="winner")], left_s, all_stay=True)
    if any(len(trial.turns) < FEWEST_ROUNDS for trial in final):
        raise UserError(
            f"--budget {budget_s / 60:g} minutes are too few to compare anything {FEWEST_ROUNDS} times here: "
            "allow more, or lower --batch"
        )
    return _finish(bench, base, best, final, evidence, file)


def choose(trials: list[Trial]) -> Candidate:
    """The best candidate; the first one, which is the present setting, unless another gains clearly."""
    present = trials[0]
    decided = [t for t in trials if t.failure is None and len(t.turns) >= FEWEST_ROUNDS]
    if present not in decided:
        return present.candidate
    best = max(decided, key=lambda trial: trial.median)
    pairs = zip(best.turns, present.turns, strict=False)
    gain = statistics.median(ours.img_per_s / theirs.img_per_s for ours, theirs in pairs)
    return best.candidate if gain >= GAIN else present.candidate


def _questions(bench: Bench, with_batch: bool) -> list[tuple[str, Callable[[Candidate], list[Candidate]]]]:
    questions: list[tuple[str, Callable[[Candidate], list[Candidate]]]] = []
    dali = choose_backend(bench.loader.backend)[0] == "dali"
    if bench.device.type == "cuda" and dali:
        questions.append(("where to decode", _decoders))
    questions += [("threads", _threads), ("queues", _queues)]
    if with_batch:
        questions.append(("batch", lambda best: _batches(best, bench.dataset.num_samples)))
    return questions


def _decoders(best: Candidate) -> list[Candidate]:
    def variant(label: str, **dali: Any) -> Candidate:
        return replace(best, label=label, loader=replace(best.loader, dali=replace(best.loader.dali, **dali)))

    mixed = [variant(f"mixed, hardware load {load:g}", decoder="mixed", hw_decoder_load=load) for load in HW_LOADS]
    return _others(best, [*mixed, variant("CPU", decoder="cpu")])


def _threads(best: Candidate) -> list[Candidate]:
    now = best.loader.threads
    counts = sorted({max(1, now // 4), max(1, now // 2), max(1, now * 3 // 4), now + max(1, now // 2)})
    return _others(best, [replace(best, label=f"{n} threads", loader=replace(best.loader, threads=n)) for n in counts])


def _queues(best: Candidate) -> list[Candidate]:
    return _others(
        best,
        [
            replace(
                best,
                label=f"prefetch {finished}, DALI's {own}, read ahead {read}",
                loader=replace(
                    best.loader, prefetch=finished, read_ahead=read, dali=replace(best.loader.dali, prefetch=own)
                ),
            )
            for finished, own, read in QUEUES
        ],
    )


def _batches(best: Candidate, samples: int) -> list[Candidate]:
    sizes = [size for size in (best.batch // 2, best.batch * 2) if 2 <= size <= samples]
    return [replace(best, label=f"batch {size}", batch=size) for size in sizes]


def _others(best: Candidate, candidates: list[Candidate]) -> list[Candidate]:
    return [candidate for candidate in candidates if candidate.loader != best.loader]


class _Search:
    """Compares candidates by turns of end-to-end training."""

    def __init__(self, bench: Bench, run: Run, climber: Climber) -> None:
        self._bench = bench
        self._run = run
        self._climber = climber

    def compare(self, candidates: list[Candidate], budget_s: float, all_stay: bool = False) -> list[Trial]:
        """Rounds of turns until the time is over; after the first, the slower half need not go on."""
        end_s = time.perf_counter() + budget_s
        trials = [Trial(candidate) for candidate in candidates]
        running = trials
        for _ in range(MOST_ROUNDS):
            if len(trials) > 1 and time.perf_counter() >= end_s:
                break
            for trial in running:
                self._turn(trial)
            running = [trial for trial in running if trial.failure is None]
            if not all_stay and len(running) > 2:
                faster = sorted(running[1:], key=lambda trial: -trial.median)
                running = [running[0], *faster[: max(1, len(faster) // 2)]]
        return trials

    def _turn(self, trial: Trial) -> None:
        name = f"{trial.candidate.loader}, {trial.candidate.batch}"
        try:
            if not self._climber.knows(name):
                self._climber.turn(name, self._rung(trial.candidate))
            trial.turns.append(self._climber.turn(name, self._rung(trial.candidate)))
        except torch.OutOfMemoryError:
            trial.failure = "out of GPU memory"
            trial.turns.clear()

    def _rung(self, candidate: Candidate) -> Rung:
        bench = replace(self._bench, loader=candidate.loader, batch=candidate.batch)
        return make_ladder(bench, self._run)["end_to_end"]


def _describe(question: str, trials: list[Trial], winner: Candidate) -> str:
    lines = [f"{question}:"]
    for trial in trials:
        rate = str(Spread.of([turn.img_per_s for turn in trial.turns])) if trial.turns else trial.failure or "no time"
        chosen = " <- chosen" if trial.candidate is winner else ""
        lines.append(f"  {trial.candidate.label:44} {rate:>28} images/s in {len(trial.turns)} turns{chosen}")
    return "\n".join(lines)


def _finish(
    bench: Bench, base: Candidate, best: Candidate, final: list[Trial], evidence: list[dict[str, Any]], file: Path
) -> LoaderTuning:
    default, winner = final
    gain = Spread.of([b.img_per_s / a.img_per_s for a, b in zip(default.turns, winner.turns, strict=False)])
    tuning = LoaderTuning(
        settings_of(best.loader),
        bench.ranks_per_machine,
        {
            "machine": machine(),
            "batch": best.batch,
            "batch_given": base.batch,
            "default": default.as_json(),
            "winner": winner.as_json(),
            "winner_over_default": asdict(gain),
            "questions": evidence,
        },
    )
    try:
        save_tuning(tuning, file)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}; choose another --tuning-file") from error
    print(_describe("default against winner", final, final[1].candidate))
    print(
        f"the winner is {gain} times as fast end to end: " + ", ".join(f"{k} {v}" for k, v in tuning.settings.items())
    )
    if best.batch != base.batch:
        print(f"batch {best.batch} is faster than {base.batch}; it changes the training, so the file leaves it out")
    print(f"{file}: take it with pretrain.py --loader-tuning {file}")
    return tuning
