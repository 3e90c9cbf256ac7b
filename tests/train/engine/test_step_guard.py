"""A step with gradients that are not finite changes nothing; many in a row end the run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import train.openmp  # noqa: F401
from model.methods.base import ParamGroup
from pipeline.loader.loader import ViewBatch
from tests.helpers import apex_stand_in
from tests.helpers.toy_runs import CPU, TINY, call
from train import pretrain
from train.engine import loop as loop_module
from train.optimization.optimizer import OptimConfig, build_optimizer
from train.optimization.precision import SkipNonFinite, diagnosis
from train.storage.run_folder import read_lines

pytestmark = pytest.mark.usefixtures("one_thread")
OFF = torch.amp.GradScaler("cpu", enabled=False)
NAN, INF = float("nan"), float("inf")


class Net(nn.Module):
    """Small, with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        self.predictor = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.predictor(self.body(x))


class Trial:
    """A net, its optimizer and its guard."""

    def __init__(self, implementation: Any) -> None:
        torch.manual_seed(0)
        self.net = Net()
        groups = [ParamGroup("all", list(self.net.parameters()))]
        self.optimizer, _ = build_optimizer(OptimConfig(optimizer=implementation), groups, 0.1, torch.device("cpu"))
        self.guard = SkipNonFinite(self.net, self.optimizer, torch.device("cpu"))

    def step(self, seed: int, poison: float | None = None) -> None:
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(seed))
        if poison is not None:
            x[3, 1] = poison
        self.guard.remember()
        self.optimizer.zero_grad(set_to_none=True)
        self.net(x).square().mean().backward()
        self.guard.step(OFF)

    def state(self) -> list[torch.Tensor]:
        tensors = list(self.net.state_dict().values())
        momenta = [state["momentum_buffer"] for state in self.optimizer.state.values()]
        return [tensor.detach().clone() for tensor in [*tensors, *momenta]]


def assert_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert len(one) == len(other)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("implementation", ["foreach", "fused"])
def test_a_bad_step_leaves_weights_momentum_and_statistics_alone(implementation: str, poison: float) -> None:
    disturbed, calm = Trial(implementation), Trial(implementation)
    for trial in (disturbed, calm):
        trial.step(1)
        trial.step(2)
    before = disturbed.state()
    disturbed.step(3, poison)
    assert_equal(disturbed.state(), before)
    for trial in (disturbed, calm):
        trial.step(4)
    assert_equal(disturbed.state(), calm.state())
    assert int(disturbed.guard.skipped) == 1


@pytest.mark.parametrize("implementation", ["foreach", "fused"])
def test_the_very_first_step_may_be_bad(implementation: str) -> None:
    disturbed, calm = Trial(implementation), Trial(implementation)
    disturbed.step(0, NAN)
    for trial in (disturbed, calm):
        trial.step(1)
        trial.step(2)
    assert_equal(disturbed.state(), calm.state())


@pytest.mark.parametrize("implementation", ["foreach", "fused"])
def test_good_steps_are_the_optimizers_own(implementation: str) -> None:
    guarded, bare = Trial(implementation), Trial(implementation)
    for seed in range(3):
        guarded.step(seed)
        bare.optimizer.zero_grad(set_to_none=True)
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(seed))
        bare.net(x).square().mean().backward()
        bare.optimizer.step()
    assert_equal(guarded.state(), bare.state())


def test_rows_are_counted() -> None:
    trial = Trial("foreach")
    for seed, poison in enumerate([None, NAN, NAN, None, NAN, NAN, NAN]):
        trial.step(seed, poison)
    assert int(trial.guard.skipped) == 5
    assert int(trial.guard.longest_row()) == 3
    trial.step(7, NAN)
    assert int(trial.guard.longest_row()) == 4  # a row goes on after it was looked at
    trial.step(8)
    assert int(trial.guard.longest_row()) == 4
    assert int(trial.guard.longest_row()) == 0


def test_apexs_kernels_are_told_through_their_own_flag() -> None:
    """Its FusedSGD gives this tensor to kernels that return at once where it is not 0. A stand-in: Apex needs a GPU."""

    class Flagged(torch.optim.SGD):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self._dummy_overflow_buf = torch.zeros(1, dtype=torch.int32)
            self.seen: list[int] = []

        def step(self, closure: Any = None) -> None:
            self.seen.append(int(self._dummy_overflow_buf))

    trial = Trial("foreach")
    flagged = Flagged(trial.net.parameters(), lr=0.1)
    trial.optimizer, trial.guard = flagged, SkipNonFinite(trial.net, flagged, torch.device("cpu"))
    for seed, poison in enumerate([None, NAN, None]):
        trial.step(seed, poison)
    assert flagged.seen == [0, 1, 0]


def test_the_diagnosis_names_fp16_only_where_it_is_used() -> None:
    assert "--precision fp32" in diagnosis(20, 20, 100, 0.1, "fp16", "step-7.pt")
    text = diagnosis(20, 20, 100, 0.125, "bf16", "step-7.pt")
    assert "--precision" not in text
    for part in ("20 steps in a row", "--max-bad-steps is 20", "0.125", "step-7.pt"):
        assert part in text


# In a run.

RUN = ["--epochs", "3", "--global-batch", "12", "--checkpoint-every", "2steps", "--log-every", "1", "--knn-every", "0"]


def run(
    monkeypatch: pytest.MonkeyPatch, data: Path, run_dir: Path, *more: str, poisoned: range = range(0)
) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and metrics of a run that sees a nan in every batch of the steps ``poisoned`` (from 0)."""
    train_step = loop_module.train_step

    def poison(it: Any, batches: Iterator[ViewBatch]) -> Any:
        def spoilt() -> Iterator[ViewBatch]:
            for views in batches:
                views.x1[0, 0, 0, 0] = NAN
                yield views

        return train_step(it, spoilt() if it.step in poisoned else batches)

    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "train_step", poison)
        places = ["--data", data, "--run-dir", run_dir, "--backend", "torchvision"]
        code = call(patch, pretrain, *places, *RUN, *TINY, *CPU, *more)
    return code, read_lines(run_dir / "metrics.jsonl")


def test_a_run_goes_on_after_bad_steps_and_counts_them(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, lines = run(monkeypatch, photo_dataset_path, tmp_path / "run", "--max-bad-steps", "3", poisoned=range(4, 6))
    assert code == 0
    assert [line.get("skipped_steps", 0) for line in lines] == [0] * 4 + [1] + [2] * 7
    assert [line["step"] for line in lines if line["loss"] != line["loss"]] == [5, 6]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["finished"]


def test_too_many_in_a_row_stop_it_with_a_diagnosis_and_it_goes_on_from_the_checkpoint(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    _, calm = run(monkeypatch, photo_dataset_path, tmp_path / "calm")
    data, run_dir = photo_dataset_path, tmp_path / "run"
    limit = ["--max-bad-steps", "3", "--checkpoint-every", "4steps"]
    code, lines = run(monkeypatch, data, run_dir, *limit, poisoned=range(4, 12))
    assert (code, len(lines)) == (2, 7)
    error = capsys.readouterr().err
    assert "3 steps in a row up to step 7" in error
    assert "The newest checkpoint is step-000000004" in error
    code, lines = run(monkeypatch, data, run_dir, *limit, "--resume")
    assert code == 0
    assert [line["loss"] for line in lines] == [line["loss"] for line in calm]


def test_a_limit_below_one_is_refused(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, photo_dataset_path, tmp_path / "run", "--max-bad-steps", "0") == (2, [])


# With Apex, as a stand-in with its signatures runs on a CPU.


def test_apex_trains_checkpoints_and_resumes_as_foreach_does(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 3 of the interrupted run is a bad one, too: the kernel changes nothing when the flag is set."""
    apex_stand_in.install(monkeypatch)
    data, bad = photo_dataset_path, range(3, 4)
    losses: dict[str, list[float]] = {}
    for name in ("foreach", "apex"):
        code, lines = run(monkeypatch, data, tmp_path / name, "--optimizer", name, poisoned=bad)
        assert code == 0
        losses[name] = [line["loss"] for line in lines]
    assert losses["apex"] == pytest.approx(losses["foreach"], abs=1e-6, nan_ok=True)
    apart = tmp_path / "apart"
    code, _ = run(monkeypatch, data, apart, "--optimizer", "apex", "--max-steps", "6", poisoned=bad)
    assert code == 0
    code, lines = run(monkeypatch, data, apart, "--optimizer", "apex", "--resume", poisoned=bad)
    assert code == 0
    assert [line["loss"] for line in lines] == pytest.approx(losses["apex"], abs=0, nan_ok=True)


def test_the_first_step_with_apex_may_be_bad(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apex_stand_in.install(monkeypatch)
    runs = [
        run(monkeypatch, photo_dataset_path, tmp_path / name, "--optimizer", name, poisoned=range(0, 1))
        for name in ("foreach", "apex")
    ]
    losses = [[line["loss"] for line in lines] for _, lines in runs]
    assert losses[1] == pytest.approx(losses[0], abs=1e-6, nan_ok=True)
