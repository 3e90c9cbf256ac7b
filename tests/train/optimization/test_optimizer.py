"""The schedule is the paper's, the update is SGD's formula, and the choice of implementation says why."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from model.methods.base import ParamGroup
from model.methods.simsiam import SimSiam, SimSiamConfig
from pipeline.common.errors import UserError
from tests.helpers import apex_stand_in
from train.optimization.optimizer import (
    OptimConfig,
    Schedule,
    build_optimizer,
    lr_at,
    make_schedule,
    set_rates,
)

CPU = torch.device("cpu")


def tiny(**switches: object) -> SimSiam:
    return SimSiam(SimSiamConfig("resnet_tiny", dim=16, projector_hidden=16, predictor_hidden=4, **switches))


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


def test_warmup_from_a_given_rate_and_an_end_above_zero() -> None:
    """SwAV's: numpy.linspace over the warm-up, then half a cosine from the peak to the end."""
    config = OptimConfig(base_lr=0.3, warmup_epochs=2, warmup_start=1 / 16, lr_end=1 / 1000)
    schedule = make_schedule(config, 4096, 10, 5)
    assert schedule.peak_lr == pytest.approx(4.8)
    assert [lr_at(schedule, step) for step in range(10)] == pytest.approx([0.3 + 4.5 * i / 9 for i in range(10)])
    assert lr_at(schedule, 10) == pytest.approx(4.8)
    assert lr_at(schedule, 50) == pytest.approx(0.0048)
    assert lr_at(schedule, 30) == pytest.approx(0.0048 + 0.5 * (4.8 - 0.0048))


def test_square_root_scaling_is_simclrs() -> None:
    config = OptimConfig(base_lr=0.075 * 16, lr_scaling="sqrt")
    assert make_schedule(config, 4096, 100, 10).peak_lr == pytest.approx(0.075 * math.sqrt(4096))
    assert make_schedule(config, 512, 100, 10).peak_lr == pytest.approx(0.075 * math.sqrt(512))


def two_groups() -> tuple[list[ParamGroup], torch.nn.Parameter, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((3, 4), (3,)))
    return [ParamGroup("weights", [weight]), ParamGroup("rest", [bias], decay=False, adapt=False)], weight, bias


def test_lars_is_the_papers_formula_with_and_without_adaptation() -> None:
    groups, weight, bias = two_groups()
    config = OptimConfig(optimizer="lars", weight_decay=1e-2, momentum=0.9)
    optimizer, line = build_optimizer(config, groups, 0.5, CPU)
    assert "LARS" in line
    w, b = weight.detach().double().clone(), bias.detach().double().clone()
    velocity_w, velocity_b = torch.zeros_like(w), torch.zeros_like(b)
    for step in range(3):
        weight.grad, bias.grad = torch.full_like(weight, 0.1 * (step + 1)), torch.full_like(bias, 0.2)
        gw = weight.grad.double()
        trust = 0.001 * w.norm() / (gw.norm() + 1e-2 * w.norm())
        velocity_w = 0.9 * velocity_w + trust * (gw + 1e-2 * w)
        velocity_b = 0.9 * velocity_b + 0.2
        w, b = w - 0.5 * velocity_w, b - 0.5 * velocity_b
        optimizer.step()
    torch.testing.assert_close(weight.detach().double(), w, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(bias.detach().double(), b, atol=1e-6, rtol=1e-5)


def test_adamw_decays_weights_alone_and_by_schedule() -> None:
    groups, weight, bias = two_groups()
    config = OptimConfig(optimizer="adamw", weight_decay=0.04, weight_decay_end=0.4, base_lr=0.1)
    optimizer, line = build_optimizer(config, groups, 0.1, CPU)
    assert "AdamW" in line
    schedule = make_schedule(config, 256, 2, 5)
    set_rates(optimizer, schedule, 5)
    assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([0.22, 0.0])
    before = weight.detach().clone(), bias.detach().clone()
    weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before[0] * (1 - 0.05 * 0.22))
    assert torch.equal(bias.detach(), before[1])


def test_a_groups_own_rate() -> None:
    groups, *_ = two_groups()
    groups[1] = replace(groups[1], lr_scale=10.0)
    optimizer, _ = build_optimizer(OptimConfig(), groups, 0.1, CPU)
    set_rates(optimizer, Schedule(peak_lr=0.1, total_steps=100, warmup_steps=0, unit_steps=1), 50)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.5])


def test_sgds_implementations_are_no_part_of_a_runs_identity_but_other_optimizers_are() -> None:
    plain = OptimConfig().identity()
    assert set(plain) == {
        f"optim.{n}" for n in ("base_lr", "momentum", "weight_decay", "warmup_epochs", "schedule_unit")
    }
    assert OptimConfig(optimizer="foreach").identity() == plain
    assert OptimConfig(optimizer="lars").identity() == {**plain, "optim.optimizer": "lars"}
    assert OptimConfig(lr_end=0.1).identity() == {**plain, "optim.lr_end": 0.1}


def test_every_trained_weight_is_in_one_group_with_weight_decay() -> None:
    model = tiny()
    optimizer, _ = build_optimizer(OptimConfig(), model.parameter_groups(), 0.1, CPU)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert all(group["weight_decay"] == 1e-4 and group["momentum"] == 0.9 for group in optimizer.param_groups)


def test_groups_leave_out_what_is_not_trained() -> None:
    frozen = SimSiam(SimSiamConfig(backbone="resnet_tiny", dim=16, projector_hidden=16, predictor="fixed-random"))
    assert [group.name for group in frozen.parameter_groups()] == ["encoder"]


@pytest.mark.parametrize(("kind", "predictor_lr"), [("constant", 0.1), ("cosine", 0.05)])
def test_predictor_lr(kind: str, predictor_lr: float) -> None:
    optimizer, _ = build_optimizer(OptimConfig(), tiny(predictor_lr=kind).parameter_groups(), 0.1, CPU)
    schedule = Schedule(peak_lr=0.1, total_steps=100, warmup_steps=0, unit_steps=1)
    assert set_rates(optimizer, schedule, 50) == pytest.approx(0.05)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, predictor_lr])


def test_update_is_sgd_with_momentum_and_weight_decay() -> None:
    model = tiny()
    optimizer, _ = build_optimizer(OptimConfig(), model.parameter_groups(), 0.1, CPU)
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
    _, line = build_optimizer(OptimConfig(), tiny().parameter_groups(), 0.1, CPU)
    assert "foreach" in line
    assert "no GPU" in line
    with pytest.raises(UserError, match=r"--optimizer apex.*GPU.*auto"):
        build_optimizer(OptimConfig(optimizer="apex"), tiny().parameter_groups(), 0.1, CPU)


@pytest.mark.parametrize("scaled", [False, True])
def test_torchs_own_fused_sgd_is_the_default_where_apex_is_built_too(
    monkeypatch: pytest.MonkeyPatch, scaled: bool
) -> None:
    apex_stand_in.install(monkeypatch)
    device = torch.device("cuda")
    _, line = build_optimizer(OptimConfig(), tiny().parameter_groups(), 0.1, device, scaled)
    assert line.startswith("torch SGD, fused (auto: as fast as Apex's")
    made, line = build_optimizer(OptimConfig(optimizer="apex"), tiny().parameter_groups(), 0.1, device, scaled)
    assert isinstance(made, apex_stand_in.FusedSGD)
    assert line.startswith("apex FusedSGD (as asked")
    assert ("makes the host wait" in line) == scaled


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_gpu_implementations_agree_with_foreach() -> None:
    device = torch.device("cuda")
    results = []
    for kind in ("auto", "fused", "foreach"):
        torch.manual_seed(0)
        model = tiny().to(device)
        optimizer, _ = build_optimizer(OptimConfig(optimizer=kind), model.parameter_groups(), 0.1, device)
        for step in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 0.01 * (step + 1))
            optimizer.step()
        results.append(model.backbone.conv1.weight.detach().clone())
    for result in results[:2]:
        torch.testing.assert_close(result, results[2], atol=1e-6, rtol=1e-5)
