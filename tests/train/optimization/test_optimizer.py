"""The schedule is the paper's, the update is SGD's formula, and the choice of implementation says why."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch

from model.methods.simsiam import SimSiam, SimSiamConfig
from pipeline.common.errors import UserError
from train.optimization import optimizer as optim
from train.optimization.optimizer import (
    OptimConfig,
    Schedule,
    build_optimizer,
    lr_at,
    make_schedule,
    parameter_groups,
    set_lr,
)

CPU = torch.device("cpu")


def tiny() -> SimSiam:
    return SimSiam(SimSiamConfig(backbone="resnet_tiny", dim=16, projector_hidden=16, predictor_hidden=4))


def test_lr_scales_with_the_global_batch() -> None:
    assert make_schedule(OptimConfig(), 512, 100, 10).peak_lr == pytest.approx(0.1)
    assert lr_at(make_schedule(OptimConfig(), 256, 100, 10), 0) == 0.05


def test_cosine_by_step() -> None:
    schedule = Schedule(peak_lr=0.1, total_steps=100, warmup_steps=0, unit_steps=1)
    assert lr_at(schedule, 0) == 0.1
    assert lr_at(schedule, 50) == pytest.approx(0.05)
    assert lr_at(schedule, 99) == pytest.approx(0.1 * 0.5 * (1 + math.cos(math.pi * 0.99)))


def test_cosine_by_epoch_is_the_official_code() -> None:
    schedule = make_schedule(OptimConfig(schedule_unit="epoch"), 256, 8, 5)
    for step in range(40):
        assert lr_at(schedule, step) == pytest.approx(0.05 * 0.5 * (1 + math.cos(math.pi * (step // 5) / 8)))


def test_warmup_is_linear_and_ends_at_the_peak() -> None:
    schedule = Schedule(peak_lr=1.0, total_steps=30, warmup_steps=10, unit_steps=1)
    assert [lr_at(schedule, step) for step in range(10)] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert lr_at(schedule, 10) == 1.0
    assert lr_at(schedule, 20) == pytest.approx(0.5)


@pytest.mark.parametrize(("batch", "epochs", "steps"), [(512, 100, 0), (1024, 100, 100), (4096, 20, 20)])
def test_warmup_of_large_batches_by_default(batch: int, epochs: int, steps: int) -> None:
    assert make_schedule(OptimConfig(), batch, epochs, 10).warmup_steps == steps
    assert make_schedule(OptimConfig(warmup_epochs=1.5), batch, epochs, 10).warmup_steps == 15


def test_every_trained_weight_is_in_one_group_with_weight_decay() -> None:
    model = tiny()
    optimizer, _ = build_optimizer(OptimConfig(), model, 0.1, CPU)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert all(group["weight_decay"] == 1e-4 and group["momentum"] == 0.9 for group in optimizer.param_groups)


def test_groups_leave_out_what_is_not_trained() -> None:
    frozen = SimSiam(SimSiamConfig(backbone="resnet_tiny", dim=16, projector_hidden=16, predictor="fixed-random"))
    assert [group["name"] for group in parameter_groups(OptimConfig(), frozen)] == ["encoder"]


@pytest.mark.parametrize(("kind", "predictor_lr"), [("constant", 0.1), ("cosine", 0.05)])
def test_predictor_lr(kind: str, predictor_lr: float) -> None:
    optimizer, _ = build_optimizer(OptimConfig(predictor_lr=kind), tiny(), 0.1, CPU)
    schedule = Schedule(peak_lr=0.1, total_steps=100, warmup_steps=0, unit_steps=1)
    assert set_lr(optimizer, schedule, 50) == pytest.approx(0.05)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, predictor_lr])


def test_update_is_sgd_with_momentum_and_weight_decay() -> None:
    model = tiny()
    optimizer, _ = build_optimizer(OptimConfig(), model, 0.1, CPU)
    weight = model.backbone.conv1.weight
    w, velocity = weight.detach().clone().double(), torch.zeros_like(weight).double()
    for step in range(3):
        gradient = torch.full_like(weight, 0.1 * (step + 1))
        weight.grad = gradient.clone()
        velocity = 0.9 * velocity + (gradient.double() + 1e-4 * w)
        w = w - 0.1 * velocity
        optimizer.step()
    torch.testing.assert_close(weight.detach().double(), w, atol=1e-6, rtol=1e-6)


def test_choice_is_named_with_its_reason() -> None:
    _, line = build_optimizer(OptimConfig(), tiny(), 0.1, CPU)
    assert "foreach" in line
    assert "no GPU" in line
    with pytest.raises(UserError, match=r"--optimizer apex.*GPU.*auto"):
        build_optimizer(OptimConfig(optimizer="apex"), tiny(), 0.1, CPU)


@pytest.mark.parametrize(("scaled", "kind"), [(False, "apex FusedSGD"), (True, "torch SGD, fused")])
def test_a_loss_scaler_takes_torchs_own_fused_sgd(monkeypatch: pytest.MonkeyPatch, scaled: bool, kind: str) -> None:
    """Where Apex is built, as these stand-ins for its modules say."""
    monkeypatch.setattr(optim, "_why_no_apex", lambda device: None)
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    stand_in = types.ModuleType("apex.optimizers")
    stand_in.FusedSGD = torch.optim.SGD  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex.optimizers", stand_in)
    _, line = build_optimizer(OptimConfig(), tiny(), 0.1, torch.device("cuda"), scaled)
    assert line.startswith(kind)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_gpu_implementations_agree_with_foreach() -> None:
    device = torch.device("cuda")
    results = []
    for kind in ("auto", "fused", "foreach"):
        torch.manual_seed(0)
        model = tiny().to(device)
        optimizer, _ = build_optimizer(OptimConfig(optimizer=kind), model, 0.1, device)
        for step in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 0.01 * (step + 1))
            optimizer.step()
        results.append(model.backbone.conv1.weight.detach().clone())
    for result in results[:2]:
        torch.testing.assert_close(result, results[2], atol=1e-6, rtol=1e-5)
