"""The method against numbers worked out by hand and against the paper's formulas written out."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.embedding_stats import z_std
from model.methods.base import MethodOutput, StepInfo
from model.methods.registry import METHODS, method_config
from model.methods.simsiam import SimSiam, SimSiamConfig, averaged_targets, negative_similarity, simsiam_loss
from pipeline.common.errors import UserError

TINY = {"backbone": "resnet_tiny", "dim": 32, "projector_hidden": 32, "predictor_hidden": 8}


def views(n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 16, 16, generator=generator), torch.randn(n, 3, 16, 16, generator=generator)


def tiny(**switches: object) -> SimSiam:
    torch.manual_seed(0)
    return SimSiam(SimSiamConfig(**{**TINY, **switches}))


def test_loss_on_a_hand_computed_example() -> None:
    p1, z2 = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[4.0, 3.0], [0.0, 1.0]])  # cosines 24/25 and 0
    p2, z1 = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[-1.0, 0.0], [3.0, 4.0]])  # cosines -1 and 4/5
    assert negative_similarity(p1, z2).item() == pytest.approx(-0.48, abs=1e-7)
    assert negative_similarity(p2, z1).item() == pytest.approx(0.1, abs=1e-7)
    assert simsiam_loss(p1, p2, z1, z2).item() == pytest.approx(-0.24 + 0.05, abs=1e-7)
    assert simsiam_loss(p1, p2, z1, z2, symmetric=False).item() == pytest.approx(-0.48, abs=1e-7)


def test_cross_entropy_on_a_hand_computed_example() -> None:
    p, z = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[math.log(4), 0.0]])  # softmax (1/4, 3/4) and (4/5, 1/5)
    expected = -(0.8 * math.log(0.25) + 0.2 * math.log(0.75))
    assert negative_similarity(p, z, "cross-entropy").item() == pytest.approx(expected, abs=1e-6)


def test_loss_gradient_is_the_written_out_one() -> None:
    torch.manual_seed(0)
    p1, p2, z1, z2 = (torch.randn(5, 7, requires_grad=i < 2) for i in range(4))
    simsiam_loss(p1, p2, z1, z2).backward()
    for p, z in ((p1, z2), (p2, z1)):
        a, b = p.detach(), z
        na, nb = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
        # d(-cos)/dp = -z / (|p| |z|) + (p.z) p / (|p|^3 |z|); half of it for each side, the mean over 5 samples
        expected = (-b / (na * nb) + (a * b).sum(dim=1, keepdim=True) * a / (na**3 * nb)) / (2 * 5)
        torch.testing.assert_close(p.grad, expected, atol=1e-6, rtol=1e-5)


def written_out_loss(model: SimSiam, x1: Tensor, x2: Tensor, stop: bool) -> Tensor:
    z1, z2 = model.projector(model.backbone(x1)), model.projector(model.backbone(x2))
    p1, p2 = model.predictor(z1), model.predictor(z2)
    total = torch.zeros(())
    for p, z in ((p1, z2), (p2, z1)):
        target = z.detach() if stop else z
        total = total - 0.5 * (p / p.norm(dim=1, keepdim=True) * target / target.norm(dim=1, keepdim=True)).sum() / len(
            p
        )
    return total


@pytest.mark.parametrize("stop", [True, False])
def test_model_gradients_are_those_of_the_written_out_formula(stop: bool) -> None:
    model = tiny(stop_gradient=stop)
    twin = copy.deepcopy(model)
    x1, x2 = views()
    out = model(x1, x2)
    loss = simsiam_loss(*out)
    loss.backward()
    expected = written_out_loss(twin, x1, x2, stop)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)


def test_the_gradient_stops() -> None:
    x1, x2 = views()
    out = tiny()(x1, x2)
    assert out.p1.requires_grad
    assert out.p2.requires_grad
    assert not out.z1.requires_grad
    assert not out.z2.requires_grad
    grads = []
    for stop in (True, False):
        model = tiny(stop_gradient=stop)
        simsiam_loss(*model(x1, x2)).backward()
        grads.append(model.backbone.conv1.weight.grad)
    assert not torch.allclose(grads[0], grads[1], rtol=0.1)


def test_each_view_has_its_own_batch_statistics() -> None:
    model = tiny()
    twin = copy.deepcopy(model)
    x1, x2 = views()
    out = model(x1, x2 * 3 + 1)
    torch.testing.assert_close(out.z1, twin.projector(twin.backbone(x1)), rtol=0, atol=0)


def test_predictor_kinds() -> None:
    x1, x2 = views()
    none = tiny(predictor="none")(x1, x2)
    assert torch.equal(none.p1, none.z1)
    frozen = tiny(predictor="fixed-random")
    simsiam_loss(*frozen(x1, x2)).backward()
    assert all(p.grad is None for p in frozen.predictor.parameters())
    assert frozen.backbone.conv1.weight.grad is not None


def test_loss_is_float32_under_autocast() -> None:
    x1, x2 = views()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = tiny()(x1, x2)
        loss = simsiam_loss(*out)
    assert out.p1.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    exact = -sum(
        F.cosine_similarity(p.double(), z.double()).mean() / 2 for p, z in ((out.p1, out.z2), (out.p2, out.z1))
    )
    assert loss.item() == pytest.approx(exact.item(), abs=1e-6)


def test_z_std_by_hand() -> None:
    assert z_std(torch.tensor([[3.0, 0.0], [0.0, 4.0]])).item() == pytest.approx(math.sqrt(0.5), abs=1e-6)
    assert z_std(torch.tensor([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]])).item() == pytest.approx(0.0, abs=1e-6)
    spread = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    assert z_std(spread).item() == pytest.approx(1 / math.sqrt(64), rel=0.02)


def test_defaults_are_the_papers() -> None:
    config = SimSiamConfig()
    assert (config.backbone, config.dim, config.projector_layers, config.predictor_width) == ("resnet50", 2048, 3, 512)
    assert (config.stop_gradient, config.predictor, config.similarity, config.symmetric) == (
        True,
        "mlp",
        "cosine",
        True,
    )


@pytest.mark.parametrize("dim", [256, 512, 1024, 2048])
def test_the_predictors_bottleneck_is_a_quarter_of_the_output(dim: int) -> None:
    predictor = SimSiam(SimSiamConfig(**{**TINY, "dim": dim, "predictor_hidden": None})).predictor
    assert [layer.weight.shape for layer in predictor if hasattr(layer, "in_features")] == [
        (dim // 4, dim),
        (dim, dim // 4),
    ]


INFO = StepInfo(step=0, total_steps=10, steps_per_epoch=5, global_batch=8)


def as_a_method(model: SimSiam, x1: Tensor, x2: Tensor, **info: object) -> MethodOutput:
    out = model([x1, x2], INFO._replace(**info))
    assert isinstance(out, MethodOutput)
    return out


@pytest.mark.parametrize(
    "switches", [{}, {"symmetric": False}, {"similarity": "cross-entropy"}, {"stop_gradient": False}]
)
def test_called_as_a_method_it_gives_the_loss_of_its_outputs(switches: dict[str, object]) -> None:
    model = tiny(**switches)
    twin, (x1, x2) = copy.deepcopy(model), views()
    seam = as_a_method(model, x1, x2)
    out = twin(x1, x2)
    loss = simsiam_loss(*out, model.config.similarity, model.config.symmetric)
    assert torch.equal(seam.loss, loss)
    assert torch.equal(seam.embedding, out.z1.detach())
    assert torch.equal(seam.metrics["z_std"], (z_std(out.z1) + z_std(out.z2)) / 2)
    seam.loss.backward()
    loss.backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert ours.grad is None if theirs.grad is None else torch.equal(ours.grad, theirs.grad)


def test_the_frozen_copy_is_renewed_every_k_steps_and_only_then() -> None:
    model = tiny(targets="frozen", target_steps=2)
    x1, x2 = views()
    losses, fresh = [], []
    for step in range(5):
        model.before_step(INFO._replace(step=step))
        reference = copy.deepcopy(model)
        out = reference(x1, x2)
        losses.append(as_a_method(model, x1, x2, step=step).loss)
        fresh.append(out)
        with torch.no_grad():
            for weight in [*model.backbone.parameters(), *model.projector.parameters()]:
                weight.mul_(0.9).add_(0.01)
    for step, source in enumerate([0, 0, 2, 2, 4]):
        expected = simsiam_loss(fresh[step].p1, fresh[step].p2, fresh[source].z1, fresh[source].z2)
        assert torch.equal(losses[step], expected)
    assert losses[1] != simsiam_loss(*fresh[1])


def test_the_average_by_hand() -> None:
    config = SimSiamConfig("resnet_tiny", dim=2, target_momentum=0.8)
    first = averaged_targets(config, torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]), torch.zeros(1, 2))
    assert [part.tolist() for part in first] == [[[1.0, 0.0]], [[0.0, 2.0]], [[0.5, 1.0]]]  # no past: F(T'(x)) itself
    second = averaged_targets(config, torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 0.0]]), first[2])
    for ours, expected in zip(second, ([[0.6, 1.0]], [[0.8, 0.8]], [[0.7, 0.9]]), strict=True):
        torch.testing.assert_close(ours, torch.tensor(expected))
    one_side = averaged_targets(
        SimSiamConfig("resnet_tiny", dim=1, target_momentum=0.5, symmetric=False),
        torch.tensor([[100.0]]),
        torch.tensor([[4.0]]),
        torch.tensor([[2.0]]),
    )
    assert one_side[2].item() == pytest.approx(3.0)


def test_a_projection_that_is_no_number_is_not_remembered() -> None:
    config = SimSiamConfig("resnet_tiny", dim=2, target_momentum=0.5)
    past = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    z = torch.tensor([[math.nan, 0.0], [1.0, 0.0]])
    target1, _, eta = averaged_targets(config, z, z, past)
    assert target1[0].isnan().any()  # this step is to be skipped
    torch.testing.assert_close(eta, torch.tensor([[1.0, 2.0], [2.0, 2.0]]))


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"backbone": "resnet_tyni"}, "--backbone resnet_tyni is unknown.*did you mean resnet_tiny"),
        ({"stem": "vit"}, "--stem vit: resnet_tiny has imagenet, cifar, small"),
        ({"dim": 0}, "--dim 0: it must be at least 1"),
        ({"pairs": 0}, "--pairs 0: it must be at least 1"),
        ({"target_momentum": 1.0}, "--target-momentum 1.0: it must be at least 0 and below 1"),
        ({"targets": "frozen", "stop_gradient": False}, "only --targets encoder has a gradient to let through"),
        ({"target_steps": 10}, "--target-steps 10 is for --targets frozen, not for encoder"),
    ],
)
def test_mistakes(switches: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SimSiamConfig(**{**TINY, **switches})


def test_checkpoints_from_before_the_newer_switches_fit() -> None:
    plain = SimSiamConfig(**TINY).identity()
    assert not [name for name in plain if "target" in name or "pairs" in name or "method" in name]
    assert plain["optim.predictor_lr"] == "constant"
    assert SimSiamConfig(**TINY, pairs=2).identity()["model.pairs"] == 2


def test_the_registry_knows_it_by_name() -> None:
    assert next(iter(METHODS)) == "simsiam"
    assert method_config("simsiam") is SimSiamConfig
    with pytest.raises(UserError, match=r"--method simsaim is unknown; known are simsiam.*did you mean simsiam"):
        method_config("simsaim")
