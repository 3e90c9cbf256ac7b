"""The collapse guard: fires when an encoder is made to collapse, stays silent when not, and says what it saw."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.embedding_stats import effective_rank, least_share, z_std
from model.heads import BatchNormPlaces
from model.methods.base import BatchShape, CollapseProfile
from model.methods.simsiam import SimSiam, SimSiamConfig, simsiam_loss
from pipeline.sampling.views import ViewRecipe
from tests.helpers import toy_runs
from train import pretrain
from train.monitoring.collapse import KNN_PATIENCE, PATIENCE, CollapseGuard, CollapseReading
from train.storage.run_folder import read_lines

DOCUMENTED_STEPS, LOG_EVERY = 150, 10
DIM = 64
TINY = SimSiamConfig("resnet_tiny", dim=DIM, projector_layers=2, projector_hidden=64, predictor_hidden=16)
NO_OUTPUT_BN = replace(TINY, projector_bn="hidden")
HEALTHY = 1 / math.sqrt(2048)


def guard(model: SimSiamConfig | None = None, views: ViewRecipe | None = None) -> CollapseGuard:
    with torch.device("meta"):
        method = SimSiam(model or SimSiamConfig())
    return CollapseGuard(method.collapse(BatchShape(256, 256, 1)), views or ViewRecipe(), peak_lr=0.1)


def reading(share: float = 1.0, rank: float = 100.0) -> CollapseReading:
    return CollapseReading(share * HEALTHY, rank, rows=256)


@dataclass(frozen=True)
class Trial:
    """A short training: what the guard said within the documented number of steps, and z_std x sqrt(d)."""

    told: str | None
    lowest: float  # of all steps


def trial(model_config: SimSiamConfig, batch: int, lr: float = 1.0, enough: float = 0.0) -> Trial:
    """It ends early once the guard has spoken and z_std x sqrt(d) has been below ``enough``."""
    torch.manual_seed(0)
    model = SimSiam(model_config).train()
    images = F.interpolate(torch.randn(max(256, batch), 3, 4, 4), size=2, mode="bilinear")
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    watching, told, shares = guard(model_config), None, []
    for step in range(1, DOCUMENTED_STEPS + 1):
        x = images[torch.randint(len(images), (batch,))]
        out = model(x + 0.3 * torch.randn_like(x), x.flip(-1) + 0.3 * torch.randn_like(x))
        optimizer.zero_grad()
        simsiam_loss(*out).backward()
        optimizer.step()
        shares.append(z_std(out.z1).item() * math.sqrt(DIM))
        if step % LOG_EVERY == 0:
            reading = CollapseReading(shares[-1] / math.sqrt(DIM), effective_rank(out.z1).item(), batch)
            told = told or watching.check(step, reading)
        if told is not None and min(shares) < enough:
            break
    return Trial(told, min(shares))


COLLAPSING = [
    ({"stop_gradient": False}, "the stop-gradient is off"),
    ({"predictor": "none"}, "there is no trained predictor"),
]


@pytest.mark.parametrize(("switched_off", "cause"), COLLAPSING)
def test_without_batch_norm_at_the_output_a_collapse_goes_to_zero(switched_off: dict[str, Any], cause: str) -> None:
    collapsed = trial(replace(NO_OUTPUT_BN, **switched_off), batch=64, enough=0.02)
    assert collapsed.lowest < 0.02
    assert "z_std is" in str(collapsed.told)
    assert f"Likely causes: {cause}" in str(collapsed.told)


@pytest.mark.parametrize(
    ("batch", "switched_off", "cause"),
    [*((batch, *kind) for batch in (16, 128) for kind in COLLAPSING), (512, *COLLAPSING[0])],
)
def test_with_it_a_collapse_goes_to_its_floor(batch: int, switched_off: dict[str, Any], cause: str) -> None:
    near = 1.2 * least_share(batch)
    collapsed = trial(replace(TINY, **switched_off), batch, enough=near)
    assert 0.99 * least_share(batch) < collapsed.lowest < near
    assert "z_std is" in str(collapsed.told)
    assert f"Likely causes: {cause}" in str(collapsed.told)


@pytest.mark.parametrize(("config", "batch"), [(TINY, 16), (TINY, 128), (NO_OUTPUT_BN, 64)])
def test_the_method_as_it_is_does_not_fire(config: SimSiamConfig, batch: int) -> None:
    healthy = trial(config, batch)
    assert healthy.told is None
    assert healthy.lowest > 0.75


def on_the_other_side(samples: int, n: int) -> Tensor:
    """z of batch norm where ``samples`` of n stand opposite to the rest."""
    side = torch.ones(n)
    side[:samples] = -(n - samples) / samples
    return nn.BatchNorm1d(DIM, affine=False, eps=1e-9)(side[:, None] * torch.randn(DIM).sign())


@pytest.mark.parametrize("n", [8, 16, 128, 512])
def test_the_floor_is_one_sample_on_the_other_side(n: int) -> None:
    for k in (1, 2, n // 2):
        share = z_std(on_the_other_side(k, n)).item() * math.sqrt(DIM)
        assert share == pytest.approx(2 * math.sqrt(k * (n - k) / (n * (n - 1))), rel=1e-4)
        assert share >= least_share(n) * (1 - 1e-4)
    assert z_std(on_the_other_side(1, n)).item() * math.sqrt(DIM) == pytest.approx(least_share(n), rel=1e-4)
    assert least_share(512) == pytest.approx(0.088, abs=5e-4)


@pytest.mark.parametrize("n", [8, 64])
def test_nothing_under_batch_norm_goes_below_the_floor(n: int) -> None:
    torch.manual_seed(0)
    before = (on_the_other_side(1, n) + 0.3 * torch.randn(n, DIM)).requires_grad_()
    norm, optimizer = nn.BatchNorm1d(DIM, affine=False), torch.optim.Adam([before], lr=0.02)
    seen = []
    for _ in range(400):
        share = (F.normalize(norm(before), dim=1).var(dim=0).mean() * DIM).sqrt()
        optimizer.zero_grad()
        share.backward()
        optimizer.step()
        seen.append(share.item())
    assert min(seen) > least_share(n) * (1 - 1e-4)
    assert seen[-1] < 1.05 * least_share(n) < seen[0]


def test_each_sign_must_last_and_is_told_once_until_recovery() -> None:
    watching = guard()
    assert watching.check(1, reading()) is None
    for step in range(2, 1 + PATIENCE):
        assert watching.check(step, reading(0.4)) is None
    told = watching.check(9, reading(0.4))
    assert told is not None
    assert "(step 9)" in told
    assert "z_std is 0.0088, 0.4 of the healthy 1/sqrt(d) = 0.022" in told
    assert "directions" not in told
    assert watching.check(10, reading(0.4)) is None
    assert watching.check(11, reading()) is None
    assert watching.check(12, reading(0.05)) is not None  # far down: nothing to wait for
    assert watching.check(13, reading()) is None
    assert watching.check(14, reading(math.nan)) is not None


@pytest.mark.parametrize(
    ("projector_bn", "rows", "told_at", "not_at"),
    [("all", 512, 0.54, 0.55), ("all", 128, 0.58, 0.6), ("all", 16, 0.74, 0.76), ("hidden", 16, 0.49, 0.51)],
)
def test_what_is_low_depends_on_how_low_it_can_be(
    projector_bn: BatchNormPlaces, rows: int, told_at: float, not_at: float
) -> None:
    for share, expected in ((told_at, True), (not_at, False)):
        watching = guard(SimSiamConfig(projector_bn=projector_bn))
        told = [watching.check(step, CollapseReading(share * HEALTHY, 100.0, rows)) for step in range(PATIENCE)]
        assert (told[-1] is not None) == expected


def test_few_directions_are_a_sign_though_z_std_is_not() -> None:
    watching = guard()
    told = [watching.check(step, reading(0.6, rank=2.0)) for step in range(PATIENCE)]
    assert told[:-1] == [None] * (PATIENCE - 1)
    assert "z spreads in 2 directions (effective rank) of 255" in str(told[-1])


def test_a_small_batch_has_few_directions_anyway() -> None:
    watching = guard()
    assert all(watching.check(step, CollapseReading(HEALTHY, 2.5, rows=8)) is None for step in range(9))


def test_knn_that_falls_is_a_sign() -> None:
    watching = guard()
    for top1 in (20.0, 18.0, 30.0, 17.0, 26.0):
        assert watching.check_knn(0, top1) is None
    told = [watching.check_knn(100, 17.0) for _ in range(KNN_PATIENCE)]
    assert told[:-1] == [None] * (KNN_PATIENCE - 1)
    assert "kNN accuracy has fallen from 30.0 to 17.0 %" in str(told[-1])


def test_a_resumed_run_remembers_how_good_it_was() -> None:
    watching = guard()
    for top1 in (20.0, 30.0, 17.0):
        watching.recall(top1)
    told = [watching.check_knn(100, 17.0) for _ in range(KNN_PATIENCE - 1)]
    assert told[:-1] == [None] * (KNN_PATIENCE - 2)
    assert "kNN accuracy has fallen from 30.0 to 17.0 %" in str(told[-1])
    fallen = guard()
    for top1 in (30.0, *[17.0] * KNN_PATIENCE):
        fallen.recall(top1)
    assert fallen.check_knn(100, 17.0) is not None  # the session that resumes says it as well
    assert fallen.check_knn(200, 17.0) is None


def test_what_is_unlike_the_recipe_is_named_first() -> None:
    model = SimSiamConfig(projector_bn="none", predictor="fixed-random")
    told = str(guard(model, ViewRecipe(jitter_prob=0.0)).check(1, reading(0.0)))
    causes = told.split("Likely causes: ")[1].split("; ")
    assert [cause.split("(")[1][:6] for cause in causes[:3]] == ["--pred", "--proj", "--jitt"]
    for part in ("learning rate", "augmentation", "batch norm"):
        assert part in told


def test_effective_rank_by_hand() -> None:
    # Four points on two axes, as far out: two equal singular values. On one axis: one.
    assert effective_rank(torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])).item() == pytest.approx(2)
    assert effective_rank(torch.tensor([[2.0, 0], [-1, 0], [3, 0]])).item() == pytest.approx(1)
    # Singular values 2 : 1, that is shares of 2/3 and 1/3.
    z = torch.tensor([[1.0, 0], [-1, 0]] * 4 + [[0.0, 1], [0, -1]])
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert effective_rank(z).item() == pytest.approx(math.exp(entropy), rel=1e-4)


@pytest.mark.parametrize(("rows", "dim"), [(40, 300), (300, 40), (100, 100)])
def test_effective_rank_is_that_of_the_singular_values(rows: int, dim: int) -> None:
    z = torch.randn(rows, dim, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.linspace(1, 3, dim))
    kept = F.normalize(z[:256], dim=1)
    singular = torch.linalg.svdvals(kept - kept.mean(0))
    share = singular / singular.sum()
    expected = torch.exp(-(share * share.clamp_min(1e-20).log()).sum())
    assert effective_rank(z).item() == pytest.approx(expected.item(), rel=1e-2)


def test_one_point_and_numbers_that_are_none() -> None:
    assert effective_rank(torch.ones(16, 8)).item() == pytest.approx(1, abs=0.01)
    assert effective_rank(torch.ones(16, 8) + 1e-7 * torch.randn(16, 8)).item() < 1.5
    assert math.isnan(effective_rank(torch.full((16, 8), torch.nan)).item())


def run(monkeypatch: pytest.MonkeyPatch, data: Path, run_dir: Path, *more: str) -> int:
    where = ["--data", str(data), "--run-dir", str(run_dir), "--device", "cpu", "--backend", "torchvision"]
    short = ["--global-batch", "12", "--epochs", "2", "--log-every", "1", "--knn-every", "0"]
    return toy_runs.call(monkeypatch, pretrain, *where, *toy_runs.TINY, *short, *more)


def test_a_run_warns_or_stops_as_it_was_told(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert run(monkeypatch, photo_dataset_path, tmp_path / "healthy", "--on-collapse", "stop") == 0
    lines = read_lines(tmp_path / "healthy" / "metrics.jsonl")
    assert all(1 <= line["z_rank"] <= 11 for line in lines)
    capsys.readouterr()
    monkeypatch.setattr(
        "train.monitoring.collapse.STD_SHARE_AT_ONCE", 2.0
    )  # now every encoder is taken for a collapsed one
    monkeypatch.setattr("train.monitoring.collapse.STD_SHARE", 2.0)
    assert run(monkeypatch, photo_dataset_path, tmp_path / "warned") == 0
    error = capsys.readouterr().err
    assert error.count("warning: the encoder is collapsing (step 1)") == 1
    assert run(monkeypatch, photo_dataset_path, tmp_path / "stopped", "--on-collapse", "stop") == 2
    error = capsys.readouterr().err
    assert "error: the encoder is collapsing (step 1). Seen: z_std is" in error
    assert "Stopped (--on-collapse stop); newest checkpoint: none so far" in error
    assert len(read_lines(tmp_path / "stopped" / "metrics.jsonl")) == 1


def test_a_loss_that_stays_where_no_two_samples_differ_is_a_sign() -> None:
    """ln(8) from a tenth of the run on; every run begins near it."""
    profile = CollapseProfile(2048, stuck_loss=math.log(8), stuck_name="ln(8)")

    def warnings(loss: float, first: int) -> list[str | None]:
        watching = CollapseGuard(profile, ViewRecipe(), peak_lr=0.1, total_steps=1000)
        return [watching.check(step, replace(reading(), loss=loss)) for step in range(first, first + 10 * PATIENCE, 10)]

    assert warnings(math.log(8), 10) == [None] * PATIENCE
    assert warnings(0.9 * math.log(8), 200) == [None] * PATIENCE
    *quiet, told = warnings(0.995 * math.log(8), 200)
    assert quiet == [None] * (PATIENCE - 1)
    assert told is not None
    assert "tells no two samples apart (ln(8) = 2.079)" in told
