"""The soak benchmark finds what grows, and nothing else, at toy size."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.common.errors import UserError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import soak

FLAT = soak.Sample(0, 0, 0.0, own_mib=100, rss_mib=200, files=12, threads=5, checkpoints_mib=11, other_mib=1)
SHORT = ["--steps", "192", "--sample-every", "4", "--checkpoint-every", "8", "--knn-every", "2", "--num-images", "96"]


def series(session: int, **growth: float) -> list[soak.Sample]:
    """Samples of 400 steps in which fields grow by so much a step."""
    samples = []
    for step in range(4, 404, 4):
        grown = {field: getattr(FLAT, field) + step * rate for field, rate in growth.items()}
        samples.append(replace(FLAT, session=session, step=step, **grown))
    return samples


@pytest.mark.parametrize(
    ("field", "a_step"),
    [("own_mib", 0.1), ("rss_mib", 0.1), ("files", 0.01), ("threads", 0.01), ("checkpoints_mib", 0.001)],
)
@pytest.mark.parametrize("session", [0, 1])
def test_growth_in_either_session_is_found(field: str, a_step: float, session: int) -> None:
    """The other session is flat, and this one ends where that one is: only its own beginning tells."""
    samples = [*series(1 - session), *series(session, **{field: a_step})]
    grown = [(growth.session, growth.quantity.field) for growth in soak.compare(samples) if growth.grew]
    assert grown == [(session, field)]
    assert soak.table(samples, soak.compare(samples)).count("GREW") == 1


def test_a_start_that_settles_and_peaks_are_no_growth() -> None:
    samples = [*series(0), *series(1)]
    for number in range(20):
        samples[number] = replace(samples[number], own_mib=20.0 + number, files=4)  # while it begins
    for number in range(3, 200, 9):
        samples[number] = replace(samples[number], own_mib=400.0, files=30, threads=50)  # an evaluation
    assert not [growth for growth in soak.compare(samples) if growth.grew]


def test_too_few_samples_are_no_answer() -> None:
    with pytest.raises(UserError, match="too few to compare"):
        soak.compare(series(0)[:5])
    with pytest.raises(UserError, match="too few for a slope"):
        soak.fit(series(0)[:12])


LIMIT, MIB = 0.1, 1.048576  # MB a minute; MB


def noisy(mb_per_minute: float, minutes: float = 30.0, seed: int = 0) -> list[soak.Sample]:
    """Two sessions of 100 steps a minute whose memory grows so fast, beside jumps, noise and peaks."""
    draw, samples = np.random.default_rng(seed), []
    for session in (0, 1):
        for number in range(600):
            at = number / 600 * minutes
            own = 500 + mb_per_minute * at / MIB + 0.2 * draw.standard_normal() + 6 * (draw.random() < 0.2)
            own -= 80 * np.exp(-at / minutes * 40)  # the warm-up
            step = round(100 * at) + session * round(100 * minutes)
            samples.append(replace(FLAT, session=session, step=step, seconds=60 * at, own_mib=own))
    return samples


@pytest.mark.parametrize("truth", [-0.05, 0.0, 0.05, 0.15, 0.5])
def test_the_slope_is_that_of_the_memory(truth: float) -> None:
    """Also in growth too slow for the allowance of the quarters."""
    samples = noisy(truth)
    assert not [growth for growth in soak.compare(samples) if growth.grew]
    slopes = soak.fit(samples)
    for slope in slopes:
        assert slope.steps_per_minute == pytest.approx(100, rel=0.01)
        assert slope.minutes == pytest.approx(22.5, rel=0.01)
        assert slope.mb_per_step * 100 == pytest.approx(truth, abs=0.03)
        assert 0 < slope.error * 100 < 0.03
        assert slope.may_exceed(LIMIT) == (truth > LIMIT)
    told = soak.slope_table(slopes, LIMIT)
    assert told.count("GREW") == (2 if truth > LIMIT else 0)
    assert f"{slopes[0].mb_per_step * 1000:+.3f}" in told
    assert f"{slopes[0].mb_per_step * 200:+.3f}" in told


def test_intervals_hold_the_truth() -> None:
    """In about 95 % of the cases."""
    slopes = [slope for seed in range(50) for slope in soak.fit(noisy(0.05, seed=seed))]
    held = sum(abs(slope.mb_per_step * slope.steps_per_minute - 0.05) <= slope.error * 100 for slope in slopes)
    assert 88 <= held <= 100


def test_an_uncertain_slope_is_not_flat() -> None:
    (slope, _) = soak.fit(noisy(0.0))
    assert not slope.may_exceed(LIMIT)
    assert replace(slope, error=0.11 / 100).may_exceed(LIMIT)


def test_minutes_too_few_are_not_judged() -> None:
    slopes = soak.fit(noisy(3.0, minutes=6.0))
    assert not any(slope.may_exceed(LIMIT) for slope in slopes)
    assert soak.slope_table(slopes, LIMIT).count("not judged: 4.5 of 5 minutes") == 2


def watched(monkeypatch: pytest.MonkeyPatch, out: Path, *more: str) -> int:
    """The command in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["soak.py", str(out), *SHORT, "--backend", "torchvision", *more])
    try:
        soak.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.faults
def test_a_short_run_is_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert watched(monkeypatch, tmp_path / "out") == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    assert "nothing grew" in said
    assert said.count("not judged") == 2
    assert "8 bad samples of 8" in said
    samples = json.loads((tmp_path / "out" / "soak.json").read_text())["samples"]
    assert {sample["session"] for sample in samples} == {0, 1}
    assert samples[-1]["step"] >= 188
    assert all(sample["threads"] > 1 and sample["files"] > 3 and sample["own_mib"] > 50 for sample in samples)
    assert (tmp_path / "out" / "soak.png").stat().st_size > 10_000


LEAKS = {
    "anonymous memory": "kept.append(torch.ones(1 << 18))",  # 1 MiB
    "open files": "kept.append(open(os.devnull))",
    "threads": "threading.Thread(target=threading.Event().wait, daemon=True).start()",
}
LEAKY = """
import train.openmp
import os, sys, threading
import torch
from pipeline.common.errors import exit_on_user_error
from train import pretrain
from train.engine import loop as loop_module

kept, step = [], loop_module.train_step

def leaky(*arguments):
    {leak}
    return step(*arguments)

loop_module.train_step = leaky
exit_on_user_error(pretrain.main)
"""


@pytest.mark.faults
@pytest.mark.parametrize("what", LEAKS)
def test_a_planted_leak_is_found(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    script = tmp_path / "leaky.py"
    script.write_text(LEAKY.format(leak=LEAKS[what]))
    monkeypatch.setenv("PYTHONPATH", str(soak.ROOT))
    monkeypatch.setattr(soak, "TRAINER", (sys.executable, str(script)))
    assert watched(monkeypatch, tmp_path / "out") == 1
    assert [line.startswith(what) for line in capsys.readouterr().out.splitlines() if "GREW" in line][:1] == [True]


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="exists: name a new folder"):
        watched(monkeypatch, tmp_path)
    with pytest.raises(UserError, match="a quarter of a session must hold"):
        watched(monkeypatch, tmp_path / "out", "--checkpoint-every", "100")
    assert not (tmp_path / "out").exists()


def test_a_trainer_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "TRAINER", (sys.executable, "-c", "raise SystemExit('no')"))
    with pytest.raises(UserError, match=r"session 0 ended with exit code 1 instead of 75:\nno"):
        watched(monkeypatch, tmp_path / "out")
