"""Each method's loss against its paper written out in float64 and by hand; the same state on any number of ranks."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import group_batchnorm
from model.backbone import build_backbone
from model.gather import gather_rows
from model.group_batchnorm import GroupBatchNorm, group_batch_norm, update_running_statistics
from model.heads import Prototypes
from model.methods.base import BatchShape, Method, MethodConfig, distribution_entropy, encode_jointly
from model.methods.byol import BYOLConfig, regression_loss
from model.methods.dino import DINOConfig, clip_each, distillation
from model.methods.moco import MoCoConfig, queue_contrast
from model.methods.registry import METHODS
from model.methods.simclr import nt_xent
from model.methods.swav import SwAVConfig, sinkhorn, swapped_prediction
from pipeline.common.errors import UserError
from pipeline.sampling.views import ViewGroup, ViewRecipe
from tests.helpers.method_ranks import GLOBAL_BATCH, images, info_of, tiny, train, train_step

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")
OTHERS = [name for name in METHODS if name != "simsiam"]


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(rows(*shape, seed=seed).detach(), dim=1)


def assert_as_written_out(ours: Tensor, inputs: list[Tensor], written_out: Any) -> None:
    """Loss and gradients of ``written_out``, which computes in float64."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = written_out(*wide)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(expected.item(), abs=2e-6)
    ours.backward()
    expected.backward()
    for x, twin in zip(inputs, wide, strict=True):
        torch.testing.assert_close(x.grad.double(), twin.grad, atol=2e-6, rtol=1e-4)


# ---- SimCLR


def written_out_nt_xent(z1: Tensor, z2: Tensor, temperature: float = 0.1) -> Tensor:
    """Section 2.1: l(i, j) = -log(exp(sim(i, j) / t) / sum over k != i of exp(sim(i, k) / t)), over all 2 N."""
    z, n = torch.cat([z1, z2]), len(z1)
    total = z.new_zeros(())
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        similar = [z[i] @ z[k] / (z[i].norm() * z[k].norm()) for k in range(2 * n)]
        others = sum(torch.exp(similar[k] / temperature) for k in range(2 * n) if k != i)
        total = total - torch.log(torch.exp(similar[j] / temperature) / others)
    return total / (2 * n)


def test_nt_xent_is_the_papers() -> None:
    z1, z2 = rows(5, 7), rows(5, 7, seed=1)
    assert_as_written_out(nt_xent([z1, z2], [z1, z2], 0.1, 0)[0], [z1, z2], written_out_nt_xent)


def test_nt_xent_by_hand() -> None:
    """Each positive has cosine 1, both negatives 0: -log(e / (e + 2)) at temperature 1."""
    z = torch.eye(2)
    loss, top1 = nt_xent([z, z], [z, z], 1.0, 0)
    assert loss.item() == pytest.approx(math.log(1 + 2 / math.e), abs=1e-6)
    assert top1.item() == 1.0


def test_nt_xent_of_equal_embeddings_is_the_alarm_value() -> None:
    z = torch.ones(4, 3)
    loss, _ = nt_xent([z, z], [z, z], 0.1, 0)
    assert loss.item() == pytest.approx(math.log(7), abs=1e-6)
    method = tiny("simclr").build()
    assert method.collapse(BatchShape(4, 4, 1)).stuck_loss == pytest.approx(math.log(7))


def test_simclr_with_predictor_and_stop_gradient_moves_the_encoder_through_the_predictor_alone() -> None:
    method = tiny("simclr", predictor=True, stop_gradient=True).build()
    with torch.no_grad():
        for weight in method.predictor.parameters():
            weight.zero_()
    method(images(0), info_of(0)).loss.backward()
    assert not method.backbone.conv1.weight.grad.any()


# ---- MoCo v2


def written_out_contrast(q: Tensor, k: Tensor, queue: Tensor, temperature: float = 0.2) -> Tensor:
    """Equation 1: -log(exp(q k+ / t) / sum of exp(q k_i / t)) over the key and the queue."""
    losses = []
    for query, key in zip(q, k, strict=True):
        positive = torch.exp(query @ key / temperature)
        losses.append(-torch.log(positive / (positive + sum(torch.exp(query @ old / temperature) for old in queue))))
    return torch.stack(losses).mean()


def test_queue_contrast_is_the_papers() -> None:
    q, k, queue = unit(4, 6).requires_grad_(), unit(4, 6, seed=1).requires_grad_(), unit(9, 6, seed=2).requires_grad_()
    assert_as_written_out(queue_contrast(q, k, queue, 0.2), [q, k, queue], written_out_contrast)


def test_queue_contrast_by_hand() -> None:
    q, queue = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, -1.0], [-1.0, 0.0]])
    expected = math.log(1 + (2 + math.exp(-1)) / math.e)  # cosines 1, 0, 0, -1 at temperature 1
    assert queue_contrast(q, q, queue, 1.0).item() == pytest.approx(expected, abs=1e-6)


def test_moco_enqueues_the_keys_after_the_loss_and_moves_the_key_encoder() -> None:
    torch.manual_seed(0)
    method = tiny("moco-v2").build().train()
    assert method.backbone.layer1[0].bn2.weight.eq(1).all()  # torchvision's start, not zero
    before = method.queue.rows.clone()
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.05)
    reference = copy.deepcopy(method)
    keys = [F.normalize(reference.teacher(view), dim=1) for view in images(0)[::-1]]
    train_step(method, method, optimizer, 0, applied=True)
    torch.testing.assert_close(method.queue.rows[: 2 * GLOBAL_BATCH], torch.cat(keys))
    assert torch.equal(method.queue.rows[2 * GLOBAL_BATCH :], before[2 * GLOBAL_BATCH :])
    for old, new, now in zip(
        reference.teacher.module[0].parameters(),
        method.backbone.parameters(),
        method.teacher.module[0].parameters(),
        strict=True,
    ):
        torch.testing.assert_close(now, 0.9 * old + 0.1 * new)


def test_a_one_sided_moco_has_view_1_as_query_and_view_2_as_key() -> None:
    torch.manual_seed(0)
    method = tiny("moco-v2", symmetric=False).build().train()
    twin, views = copy.deepcopy(method), images(0)
    q = F.normalize(twin.projector(twin.backbone(views[0])), dim=1)
    k = F.normalize(twin.teacher(views[1]), dim=1)
    expected = written_out_contrast(q.double(), k.double(), twin.queue.rows.double())
    assert method(views, info_of(0)).loss.item() == pytest.approx(expected.item(), abs=1e-5)


# ---- batch norm in groups


@pytest.mark.parametrize("shape", [(12, 5, 4, 4), (12, 5)])
@pytest.mark.parametrize("kind", ["in a row", "strided"])
def test_a_group_is_normalised_as_a_batch_of_its_own(kind: Any, shape: tuple[int, ...]) -> None:
    plain = nn.BatchNorm2d(5) if len(shape) == 4 else nn.BatchNorm1d(5)
    nn.init.uniform_(plain.weight, 0.5, 1.5)
    nn.init.uniform_(plain.bias)
    layer = group_batch_norm(copy.deepcopy(plain), 4, kind)
    x = rows(*shape).detach() * 3 + 1
    made = layer(x)
    groups = [range(g * 4, g * 4 + 4) if kind == "in a row" else range(g, 12, 3) for g in range(3)]
    statistics = []
    for group in groups:
        twin = copy.deepcopy(plain)
        torch.testing.assert_close(made[list(group)], twin(x[list(group)]), atol=1e-5, rtol=1e-5)
        statistics.append((twin.running_mean, twin.running_var))
    assert layer.running_var.eq(1).all()
    update_running_statistics(layer, torch.tensor(0.0))
    assert layer.running_var.eq(1).all()
    layer(x)
    update_running_statistics(layer, torch.tensor(1.0))
    means, variances = (torch.stack(values).mean(dim=0) for values in zip(*statistics, strict=True))
    torch.testing.assert_close(layer.running_mean, means)
    torch.testing.assert_close(layer.running_var, variances)
    assert int(layer.num_batches_tracked) == 1
    layer.eval()
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), plain.eval()(x))


@pytest.mark.parametrize(("count", "images_of_group"), [(8, 4), (24, 4), (24, 12), (96, 32), (256, 32)])
def test_no_key_has_the_companions_of_its_query(count: int, images_of_group: int) -> None:
    """Which images a row is normalised with, seen by one image at a time; a group of keys mixes those of queries."""

    def companions(kind: Any) -> Tensor:
        layer = group_batch_norm(nn.BatchNorm1d(count, affine=False), images_of_group, kind)
        return layer(torch.eye(count)).ne(layer(torch.zeros(count, count)))  # [row, image]: column j is image j

    queries, keys = companions("in a row"), companions("strided")
    groups = count // images_of_group
    for row in range(count):
        assert queries[row].sum() == keys[row].sum() == images_of_group
        assert not torch.equal(queries[row], keys[row])
        of_each_group = keys[row].view(groups, images_of_group).sum(dim=1)  # of each group of queries
        assert of_each_group.max() - of_each_group.min() <= 1


def test_the_teachers_statistics_cross_the_network_as_small_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not an image does: [2, groups, channels] for each layer, and one layer for each batch norm."""
    tables: list[tuple[int, ...]] = []

    def record(table: Tensor) -> Tensor:
        tables.append(tuple(table.shape))
        return table

    monkeypatch.setattr(group_batchnorm, "sum_over_ranks", record)
    method = tiny("moco-v2").build().train()
    method.teacher(images(0)[0])
    layers = [layer for layer in method.teacher.modules() if isinstance(layer, GroupBatchNorm)]
    assert tables == [(2, GLOBAL_BATCH // 4, layer.num_features) for layer in layers]


def test_every_key_group_has_images_of_every_query_group() -> None:
    """So no query shares its statistics with its key."""
    layer = group_batch_norm(nn.BatchNorm1d(1, affine=False), 4, "strided")
    x = torch.zeros(16, 1)
    x[:4] = 1.0  # one group of the student
    made = layer(x)
    assert made[:4].unique().numel() == 1  # each of them stands out alike in its own group
    assert made[4:].unique().numel() == 1


def test_all_batch_norms_are_replaced_and_keep_their_names() -> None:
    backbone, _ = build_backbone("resnet_tiny")
    names = list(backbone.state_dict())
    group_batch_norm(backbone, 4, "in a row")
    assert list(backbone.state_dict()) == names
    assert not [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [m for m in backbone.modules() if isinstance(m, GroupBatchNorm)]


def test_the_activation_of_timms_layers_stays() -> None:
    backbone, _ = build_backbone("timm:efficientnet_lite0")
    twin = copy.deepcopy(backbone).train()
    names = list(backbone.state_dict())
    group_batch_norm(backbone.train(), 4, "in a row")
    assert list(backbone.state_dict()) == names
    x = rows(4, 3, 32, 32).detach()
    torch.testing.assert_close(backbone(x), twin(x), atol=1e-4, rtol=1e-4)  # one group is the whole batch


# ---- BYOL


def test_regression_loss_is_the_papers() -> None:
    p, z = rows(5, 7), rows(5, 7, seed=1)

    def written_out(p: Tensor, z: Tensor) -> Tensor:
        """Equation 2: the squared distance of the normalised vectors."""
        return sum((a / a.norm() - b / b.norm()).square().sum() for a, b in zip(p, z, strict=True)) / len(p)

    assert_as_written_out(regression_loss(p, z), [p, z], written_out)


def test_regression_loss_by_hand() -> None:
    p, z = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[4.0, 3.0], [-2.0, 0.0]])  # cosines 24/25 and -1
    assert regression_loss(p, z).item() == pytest.approx((0.08 + 4) / 2, abs=1e-6)


def test_byol_sums_both_directions_against_the_teacher() -> None:
    torch.manual_seed(0)
    method = tiny("byol").build().train()
    with torch.no_grad():
        for weight in method.teacher.parameters():
            weight.mul_(1.1)
    twin, (x1, x2) = copy.deepcopy(method), images(0)
    z1, z2 = (twin.projector(twin.backbone(x)) for x in (x1, x2))
    t1, t2 = twin.teacher(x1), twin.teacher(x2)
    out = method([x1, x2], info_of(0))
    expected = regression_loss(twin.predictor(z1), t2) + regression_loss(twin.predictor(z2), t1)
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    expected.backward()
    for ours, theirs in zip(method.parameters(), twin.parameters(), strict=True):
        assert theirs.grad is None if ours.grad is None else torch.allclose(ours.grad, theirs.grad, atol=1e-6)


def test_byols_teacher_moves_after_the_optimizer_with_this_steps_tau() -> None:
    torch.manual_seed(0)
    method = tiny("byol").build().train()
    before = [weight.clone() for weight in method.teacher.module.parameters()]
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.05)
    train_step(method, method, optimizer, 2, applied=True)
    tau = method.schedules(info_of(2))["teacher_momentum"]
    assert tau == pytest.approx(1 - 0.1 * (math.cos(math.pi / 3) + 1) / 2)
    student = [*method.backbone.parameters(), *method.projector.parameters()]
    for old, new, now in zip(before, student, method.teacher.module.parameters(), strict=True):
        torch.testing.assert_close(now, tau * old + (1 - tau) * new)


def test_byol_without_momentum_encoder_has_none() -> None:
    method = tiny("byol", momentum_encoder=False, predictor_lr_scale=10.0).build()
    assert not [name for name in method.state_dict() if name.startswith("teacher")]
    assert {group.lr_scale for group in method.parameter_groups() if "predictor" in group.name} == {10.0}
    out = method(images(0), info_of(0))
    out.loss.backward()
    assert out.loss.item() > 0


@pytest.mark.parametrize("name", ["simclr", "byol", "dino"])
def test_biases_and_norms_have_neither_decay_nor_adaptation(name: str) -> None:
    method = tiny(name).build()
    groups = method.parameter_groups()
    held = [id(p) for group in groups for p in group.params]
    assert sorted(held) == sorted(id(p) for p in method.parameters() if p.requires_grad)
    for group in groups:
        assert all((p.ndim > 1) == group.decay == group.adapt for p in group.params)


@pytest.mark.parametrize("name", ["moco-v2", "swav"])
def test_the_others_decay_everything(name: str) -> None:
    (group,) = tiny(name).build().parameter_groups()
    assert group.decay
    assert group.adapt


# ---- SwAV


def written_out_sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Algorithm 1 of the paper's appendix, loops written out: Q is prototypes x samples."""
    q = torch.exp(scores / epsilon).T
    q = q / q.sum()
    k, b = q.shape
    for _ in range(iterations):
        q = torch.stack([row / row.sum() / k for row in q])
        q = torch.stack([column / column.sum() / b for column in q.T]).T
    return (q * b).T


def test_sinkhorn_is_the_papers() -> None:
    scores = (unit(8, 5) @ unit(4, 5, seed=1).T).requires_grad_()
    weights = rows(8, 4, seed=3).detach()
    assert_as_written_out(
        (sinkhorn(scores, 0.05, 3) * weights).sum(),
        [scores],
        lambda s: (written_out_sinkhorn(s) * weights.double()).sum(),
    )
    q = sinkhorn(scores, 0.05, 3)
    torch.testing.assert_close(q.sum(dim=1), torch.ones(8))  # each sample has a distribution
    torch.testing.assert_close(sinkhorn(scores, 0.5, 100).mean(dim=0), torch.full((4,), 0.25), atol=1e-4, rtol=0)


def test_sinkhorn_by_hand() -> None:
    """Two samples that prefer the same prototype: used evenly, each prototype has half of their mass."""
    scores = torch.log(torch.tensor([[2.0, 1.0], [2.0, 1.0]]))  # epsilon 1: q is these ratios
    torch.testing.assert_close(sinkhorn(scores, 1.0, 1), torch.full((2, 2), 0.5))


def test_sinkhorn_stands_scores_that_float16_could_not_hold() -> None:
    scores = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float16)
    made = sinkhorn(scores, 0.05, 3)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, torch.eye(2))


@pytest.mark.parametrize("epsilon", [0.02, 0.005, 1e-4])
def test_sinkhorn_stands_any_epsilon(epsilon: float) -> None:
    scores = (unit(16, 5) @ unit(4, 5, seed=1).T).requires_grad_()
    q = sinkhorn(scores, epsilon, 3)
    torch.testing.assert_close(q.sum(dim=1), torch.ones(16))
    q.square().sum().backward()
    assert scores.grad.isfinite().all()
    if epsilon >= 0.005:  # float64 holds exp(1 / 0.005)
        torch.testing.assert_close(q.double(), written_out_sinkhorn(scores.double(), epsilon), atol=1e-4, rtol=1e-3)


def test_swapped_prediction_by_hand() -> None:
    scores = [torch.log(torch.tensor([[3.0, 1.0]])), torch.log(torch.tensor([[1.0, 1.0]]))]
    q = [torch.tensor([[0.8, 0.2]]), torch.tensor([[1.0, 0.0]])]
    expected = (math.log(2) - math.log(0.75)) / 2  # view 2 predicts q1, view 1 predicts q2
    assert swapped_prediction(scores, q, 1.0).item() == pytest.approx(expected, abs=1e-6)


def test_swav_predicts_each_assignment_from_all_other_views() -> None:
    torch.manual_seed(0)
    method = tiny("swav").build().train()
    views = [*images(0), *images(1, views=2, side=8)]
    twin = copy.deepcopy(method)
    encoder = nn.Sequential(twin.backbone, twin.projector)
    z = [*encoder(torch.cat(views[:2])).chunk(2), *encoder(torch.cat(views[2:])).chunk(2)]
    scores = [F.normalize(x.double(), dim=1) @ twin.prototypes.weight.double().T for x in z]
    expected = torch.zeros((), dtype=torch.float64)
    for a in range(2):
        q = written_out_sinkhorn(scores[a].detach())
        for v in range(4):
            if v != a:
                expected = expected - (q * torch.log_softmax(scores[v] / 0.1, dim=1)).sum(dim=1).mean() / 3 / 2
    out = method(views, info_of(0))
    assert out.loss.item() == pytest.approx(expected.item(), abs=1e-5)
    out.loss.backward()
    expected.backward()
    for ours, theirs in zip(method.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad.float(), atol=1e-5, rtol=1e-3)


def test_prototypes_have_length_1_between_steps_and_stay_while_frozen() -> None:
    torch.manual_seed(0)
    method = tiny("swav").build().train()
    optimizer = torch.optim.SGD(
        [p for p in method.parameters() if p.requires_grad], 0.5, momentum=0.9, weight_decay=0.1
    )
    start = method.prototypes.weight.detach().clone()
    torch.testing.assert_close(start.norm(dim=1), torch.ones(10))
    for step in range(4):
        train_step(method, method, optimizer, step, applied=True)
        assert torch.equal(method.prototypes.weight, start) == (step < 2)  # the first epoch has 2 steps
        torch.testing.assert_close(method.prototypes.weight.norm(dim=1), torch.ones(10))


def test_the_queue_is_assigned_along_with_the_batch_once_it_is_full_and_due() -> None:
    torch.manual_seed(0)
    method = tiny("swav", queue=48, queue_from_epoch=1).build().train()
    assert [method._uses_queue(info_of(step)) for step in range(4)] == [False, False, True, True]
    views = images(0)
    twin = copy.deepcopy(method)
    z = twin.projector(twin.backbone(torch.cat(views))).chunk(2)
    z = [F.normalize(x.double(), dim=1) for x in z]
    prototypes = twin.prototypes.weight.double()
    expected = torch.zeros((), dtype=torch.float64)
    for a in range(2):
        together = torch.cat([twin.queues[a].rows.double(), z[a]]) @ prototypes.T
        q = written_out_sinkhorn(together.detach())[-GLOBAL_BATCH:]
        expected = expected - (q * torch.log_softmax(z[1 - a] @ prototypes.T / 0.1, dim=1)).sum(dim=1).mean() / 2
    method.before_step(info_of(2))
    assert method(views, info_of(2)).loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_without_stop_gradient_the_assignments_have_one() -> None:
    """Their own gradient reaches the encoder, and is another than the predictions' alone."""
    gradients = []
    for stop in (True, False):
        torch.manual_seed(0)
        method = tiny("swav", stop_gradient=stop).build().train()
        method(images(0), info_of(0)).loss.backward()
        gradients.append(method.backbone.conv1.weight.grad)
    assert not torch.allclose(*gradients, rtol=0.05)


# ---- DINO


def test_distillation_is_the_papers() -> None:
    student, teacher = [rows(4, 6, seed=i) for i in range(3)], [rows(4, 6, seed=9 + i).detach() for i in range(2)]
    centre = rows(6, seed=20).detach() / 10

    def written_out(*student: Tensor) -> Tensor:
        """Algorithm 1, over all pairs of a teacher's view and another view of the student."""
        losses = []
        for t, logits in enumerate(teacher):
            target = torch.softmax((logits.double() - centre.double()) / 0.04, dim=1)
            losses += [
                -(target * torch.log(torch.softmax(s / 0.1, dim=1))).sum(dim=1).mean()
                for v, s in enumerate(student)
                if v != t
            ]
        return sum(losses) / len(losses)

    scaled = [(s.detach() / 10).requires_grad_() for s in student]
    assert_as_written_out(distillation(scaled, teacher, centre, 0.1, 0.04), scaled, written_out)


def test_distillation_by_hand() -> None:
    student = [torch.zeros(1, 2), torch.log(torch.tensor([[3.0, 1.0]]))]
    teacher = [torch.log(torch.tensor([[8.0, 1.0]])), torch.log(torch.tensor([[2.0, 2.0]]))]
    centre = torch.log(torch.tensor([2.0, 1.0]))  # the targets are (4/5, 1/5) and (1/3, 2/3)
    expected = (-(0.8 * math.log(0.75) + 0.2 * math.log(0.25)) + math.log(2)) / 2
    assert distillation(student, teacher, centre, 1.0, 1.0).item() == pytest.approx(expected, abs=1e-6)


def test_the_centre_is_a_moving_average_of_the_teachers_outputs() -> None:
    torch.manual_seed(0)
    method = tiny("dino").build().train()
    twin = copy.deepcopy(method)
    outputs = twin.teacher(torch.cat(images(0)))
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.05)
    train_step(method, method, optimizer, 0, applied=True)
    torch.testing.assert_close(method.centre, 0.1 * outputs.mean(dim=0))


def test_the_last_layer_stays_at_first() -> None:
    torch.manual_seed(0)
    method = tiny("dino").build().train()
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], 0.01)
    start = method.prototypes.weight.detach().clone()
    for step in range(4):
        train_step(method, method, optimizer, step, applied=True)
        assert torch.equal(method.prototypes.weight, start) == (step < 2)


def test_the_teacher_sees_two_views_and_the_student_all() -> None:
    method = tiny("dino").build().train()
    seen: dict[str, list[tuple[int, ...]]] = {"student": [], "teacher": []}
    method.backbone.register_forward_pre_hook(lambda _, x: seen["student"].append(tuple(x[0].shape)))
    method.teacher.module[0].register_forward_pre_hook(lambda _, x: seen["teacher"].append(tuple(x[0].shape)))
    method([*images(0), *images(1, views=3, side=8)], info_of(0))
    assert seen == {"student": [(48, 3, 16, 16), (72, 3, 8, 8)], "teacher": [(48, 3, 16, 16)]}


def test_the_teachers_temperature_rises_by_epochs() -> None:
    config = DINOConfig(
        "resnet_tiny", warmup_teacher_temperature=0.04, teacher_temperature=0.07, teacher_temperature_epochs=3
    )
    assert [config.temperature_at(info_of(step)) for step in range(0, 9, 2)] == pytest.approx(
        [0.04, 0.055, 0.07, 0.07, 0.07]
    )
    assert DINOConfig("resnet_tiny").temperature_at(info_of(0)) == 0.04


def test_the_weight_normalised_layer_ignores_lengths() -> None:
    layer = Prototypes(5, 4, normalised=True)
    z = unit(3, 5)
    before = layer(z)
    with torch.no_grad():
        layer.weight.mul_(torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
    torch.testing.assert_close(layer(z), before)
    assert before.abs().max() <= 1 + 1e-6


def test_the_head_has_batch_norm_where_asked_for_and_older_checkpoints_know_nothing_of_it() -> None:
    plain, normed = tiny("dino"), tiny("dino", head_batch_norm=True)
    assert not [m for m in plain.build().head if isinstance(m, nn.BatchNorm1d)]
    kinds = [type(m) for m in normed.build().head]
    assert kinds[:3] == [nn.Linear, nn.BatchNorm1d, nn.GELU]
    assert kinds[-2] is nn.Linear  # none after the last
    assert "model.head_batch_norm" not in plain.identity()
    assert normed.identity()["model.head_batch_norm"] is True


def test_each_gradient_is_clipped_by_its_own_norm() -> None:
    gradients = [torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4]), torch.tensor([math.nan, 1.0])]
    clip_each(gradients, 1.0)
    torch.testing.assert_close(gradients[0], torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(gradients[1], torch.tensor([0.3, 0.4]))
    assert gradients[2].isnan().any()


# ---- what all methods promise


def test_entropy_of_even_and_of_single_use() -> None:
    assert distribution_entropy(torch.zeros(3, 8)).item() == pytest.approx(math.log(8), abs=1e-6)
    assert distribution_entropy(torch.tensor([[100.0, 0.0]] * 4)).item() == pytest.approx(0.0, abs=1e-6)


def test_views_of_one_size_in_a_row_are_one_pass() -> None:
    layer = nn.Sequential(nn.Flatten(), nn.LazyLinear(2))
    sizes: list[int] = []
    layer.register_forward_pre_hook(lambda _, x: sizes.append(len(x[0])))
    views = [torch.zeros(4, 3, 2, 2), torch.zeros(4, 3, 2, 2)]
    assert [tuple(z.shape) for z in encode_jointly(layer, views)] == [(4, 2), (4, 2)]
    assert sizes == [8]


@pytest.mark.parametrize("name", METHODS)
def test_a_pass_gives_loss_embedding_and_metrics(name: str) -> None:
    torch.manual_seed(0)
    config = tiny(name)
    method = config.build().train()
    method.before_step(info_of(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = method(images(0), info_of(0))
    assert out.loss.dtype == torch.float32
    assert out.loss.shape == ()
    assert not out.embedding.requires_grad
    assert len(out.embedding) == GLOBAL_BATCH
    assert "z_std" in out.metrics
    assert all(value.shape == () and not value.requires_grad for value in out.metrics.values())
    profile = method.collapse(BatchShape(GLOBAL_BATCH, GLOBAL_BATCH, 1))
    assert profile.dim == out.embedding.shape[1]
    assert config.identity()["model.backbone"] == "resnet_tiny"


def with_equal_outputs(method: Method) -> Method:
    """Every embedding, score and logit of it is the same: what a collapse gives."""
    teacher = getattr(method, "teacher", None)
    for backbone in [method.backbone, *([] if teacher is None else [teacher.module[0]])]:
        backbone.register_forward_hook(lambda _, x, y: torch.zeros_like(y))
    for module in method.modules():
        if isinstance(module, Prototypes):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.ones_(module.bias)
    return method


@pytest.mark.parametrize("name", ["swav", "dino"])
def test_a_collapsed_encoder_has_the_alarm_value_as_loss(name: str) -> None:
    method = with_equal_outputs(tiny(name).build().train())
    out = method(images(0), info_of(0))
    assert out.loss.item() == pytest.approx(method.collapse(BatchShape(24, 24, 1)).stuck_loss, abs=1e-4)


def test_mocos_alarm_value_is_that_of_equal_keys() -> None:
    method = with_equal_outputs(tiny("moco-v2").build().train())
    method.queue.rows.copy_(F.normalize(method.projector(torch.zeros(1, 192)), dim=1).detach().expand(96, 8))
    out = method(images(0), info_of(0))
    profile = method.collapse(BatchShape(24, 24, 1))
    assert out.loss.item() == pytest.approx(profile.stuck_loss, abs=1e-4)
    assert profile.stuck_name == "2 ln(97)"


@pytest.mark.parametrize("name", METHODS)
def test_a_skipped_step_changes_nothing(name: str) -> None:
    """Teacher, queue, prototypes and centre included. Running statistics are the guard's, which puts them back."""
    torch.manual_seed(0)
    method = tiny(name).build().train()
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.05, momentum=0.9)
    for step in range(3):
        train_step(method, method, optimizer, step, applied=True)
    kept = {key for key in method.state_dict() if not key.endswith(("running_mean", "running_var", "batches_tracked"))}
    before = {key: value.clone() for key, value in method.state_dict().items()}
    train_step(method, method, optimizer, 3, applied=False)
    assert not [key for key in kept if not torch.equal(method.state_dict()[key], before[key])]
    train_step(method, method, optimizer, 4, applied=True)
    assert [key for key in kept if not torch.equal(method.state_dict()[key], before[key])]


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_finite_does_not_get_into_the_state(name: str) -> None:
    torch.manual_seed(0)
    method = tiny(name).build().train()
    info = info_of(0)
    method.before_step(info)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    views = images(0)
    views[0][3, 1] = math.nan
    method(views, info).loss.backward()
    method.before_optimizer(info)
    method.after_step(info, torch.tensor(0.0))
    changed = [key for key, value in method.state_dict().items() if not torch.equal(value, before[key])]
    assert not [key for key in changed if not key.endswith(("running_mean", "running_var", "batches_tracked"))]


@pytest.fixture(scope="module")
def on_one_rank(one_thread: None) -> dict[str, Any]:
    return {name: train(tiny(name)) for name in METHODS}


@pytest.mark.parametrize("ranks", [2, 3])
def test_losses_and_state_are_the_same_on_any_number_of_ranks(
    ranks: int, on_one_rank: dict[str, Any], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    script = str(ROOT / "tests" / "helpers" / "method_ranks.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [str(tmp_path / "out.pt"), *METHODS]
    done = subprocess.run([*command, script, *arguments], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "all_gather_into_tensor" not in done.stderr  # torch 2.14 warns of it
    for name, (losses, state) in torch.load(tmp_path / "out.pt").items():
        expected_losses, expected = on_one_rank[name]
        assert losses == pytest.approx(expected_losses, rel=1e-7, abs=1e-7), name
        assert state.keys() == expected.keys()
        for key, value in state.items():
            assert torch.allclose(value, expected[key], atol=1e-6, rtol=1e-6), (name, key)


def test_outside_of_a_process_group_gathering_is_nothing() -> None:
    x = rows(3, 2)
    assert gather_rows(x) is x


# ---- mistakes


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("simclr", {"temperature": 0.0}, "--temperature 0.0: it must be above 0"),
        ("simclr", {"dim": 0}, "--dim 0: it must be at least 1"),
        ("moco-v2", {"teacher_momentum": 1.5}, "--teacher-momentum 1.5: it must lie in 0"),
        ("moco-v2", {"bn_images": 1}, "--bn-images 1: batch norm needs at least 2"),
        ("byol", {"predictor_lr_scale": math.inf}, "--predictor-lr-scale inf"),
        ("byol", {"backbone": "resnet_50"}, "--backbone resnet_50 is unknown"),
        ("swav", {"epsilon": math.nan}, "--epsilon nan: it must be above 0"),
        ("swav", {"prototypes": 1}, "--prototypes 1: it must be at least 2"),
        ("swav", {"freeze_prototypes": -1}, "--freeze-prototypes -1"),
        ("dino", {"centre_momentum": -0.1}, "--centre-momentum -0.1"),
        ("dino", {"clip_gradient": math.nan}, "--clip-gradient nan"),
    ],
)
def test_numbers_that_cannot_be(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        METHODS[name](**{"backbone": "resnet_tiny", **fields})


@pytest.mark.parametrize(
    ("config", "batch", "message"),
    [
        (
            MoCoConfig("resnet_tiny", queue=1000),
            BatchShape(256, 256, 1, False),
            r"--queue 1000 .* 512 keys.*: take 1024",
        ),
        (MoCoConfig("resnet_tiny"), BatchShape(256, 128, 2, True), "--sync-bn with --method moco-v2.*issue 46"),
        (
            MoCoConfig("resnet_tiny"),
            BatchShape(64, 16, 2, False),
            r"--bn-images 32 .* 16 images.*2 ranks x --accumulate 2",
        ),
        (
            MoCoConfig("resnet_tiny", queue=1024),
            BatchShape(32, 32, 1, False),
            r"--bn-images 32 makes one group of all 32 images of a pass.*take 16 or less",
        ),
        (
            SwAVConfig("resnet_tiny", queue=1000),
            BatchShape(256, 256, 1),
            "--queue 1000 .*--global-batch 256: take 1024",
        ),
        (
            SwAVConfig("resnet_tiny", prototypes=10**9),
            BatchShape(256, 256, 1, memory_bytes=2**30),
            "--prototypes 1000000000 takes at least .* take at most",
        ),
        (
            DINOConfig("resnet_tiny", prototypes=10**9),
            BatchShape(256, 256, 1, memory_bytes=2**30),
            "--prototypes 1000000000 takes at least .* take at most",
        ),
    ],
)
def test_batches_that_do_not_fit(config: MethodConfig, batch: BatchShape, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.check(batch, ViewRecipe())


@pytest.mark.parametrize("name", METHODS)
def test_the_views_of_the_paper_are_taken_and_a_single_one_is_refused(name: str) -> None:
    config = tiny(name)
    batch = BatchShape(GLOBAL_BATCH, GLOBAL_BATCH, 1, not config.own_batch_norm)
    views = config.default_views()
    assert len(views.per_view) == 2
    config.check(batch, views)
    with pytest.raises(UserError, match=rf"views of each image: 1: --method {name} takes .*--more-views"):
        config.check(batch, ViewRecipe(count=1))
    six = ViewRecipe(count=2, more_views=(ViewGroup(count=4, image_size=96),))
    if config.most_views is None:
        config.check(batch, six)
    else:
        with pytest.raises(UserError, match=f"views of each image: 6: --method {name} takes exactly 2 views"):
            config.check(batch, six)


@pytest.mark.parametrize("config", [MoCoConfig("resnet_tiny"), SwAVConfig("resnet_tiny"), BYOLConfig("resnet_tiny")])
def test_the_defaults_fit_the_reference_batch(config: MethodConfig) -> None:
    config.check(BatchShape(256, 32, 8, not config.own_batch_norm), ViewRecipe())
