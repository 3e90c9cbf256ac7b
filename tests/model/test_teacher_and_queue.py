"""Teacher and queue: their formulas by hand, and a skipped step that changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from model.feature_queue import FeatureQueue
from model.momentum import Teacher, cosine_momentum

APPLIED, SKIPPED = torch.tensor(1.0), torch.tensor(0.0)


def student(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def moved(module: nn.Module, seed: int = 5) -> None:
    """Other weights and statistics."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn_like(weight))
    module(torch.randn(16, 3))


def test_the_teacher_starts_as_a_copy_and_has_no_gradient() -> None:
    model = student()
    teacher = Teacher(model)
    x = torch.randn(8, 3)
    assert torch.equal(teacher(x), model(x))
    assert not teacher(x).requires_grad
    assert not [weight for weight in teacher.parameters() if weight.requires_grad]
    assert all(a is not b for a, b in zip(teacher.parameters(), model.parameters(), strict=True))


def test_update_is_the_moving_average() -> None:
    model = student()
    teacher = Teacher(model)
    before = [weight.detach().double() for weight in teacher.parameters()]
    statistics = [buffer.clone() for buffer in teacher.buffers()]
    moved(model)
    teacher.update(model, 0.9, APPLIED)
    for old, new, now in zip(before, model.parameters(), teacher.parameters(), strict=True):
        torch.testing.assert_close(now.detach().double(), 0.9 * old + 0.1 * new.detach().double(), atol=1e-6, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(statistics, teacher.buffers(), strict=True))  # its own batches' alone


def test_a_small_step_is_not_lost_to_rounding() -> None:
    """1 - 0.9999 is below half a unit in the last place of bfloat16 numbers near 1."""
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 1.0)
    teacher = Teacher(model)
    nn.init.constant_(model.weight, 2.0)
    for _ in range(100):
        teacher.update(model, 0.9999, APPLIED)
    assert teacher.module.weight.item() == pytest.approx(2 - 0.9999**100, abs=1e-5)


def test_a_skipped_step_leaves_the_teacher_alone() -> None:
    model = student()
    teacher = Teacher(model)
    moved(model)
    before = [weight.clone() for weight in teacher.parameters()]
    teacher.update(model, 0.5, SKIPPED)
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))


def test_copies_are_made_before_every_kth_step() -> None:
    model = student()
    teacher = Teacher(model)
    copied = []
    for step in range(7):
        moved(model, seed=step)
        teacher.copy_every(model, step, 3)
        pairs = zip(model.state_dict().values(), teacher.module.state_dict().values(), strict=True)
        copied.append(all(torch.equal(a, b) for a, b in pairs))
    assert copied == [True, False, False, True, False, False, True]


def test_byols_schedule_of_tau() -> None:
    assert cosine_momentum(0.99, 0, 100) == pytest.approx(0.99)
    assert cosine_momentum(0.99, 50, 100) == pytest.approx(0.995)
    assert cosine_momentum(0.99, 100, 100) == pytest.approx(1.0)
    assert cosine_momentum(0.996, 25, 100) == pytest.approx(1 - 0.004 * (math.sqrt(0.5) + 1) / 2)


def test_the_queue_starts_as_unit_vectors_and_replaces_the_oldest() -> None:
    torch.manual_seed(0)
    queue = FeatureQueue(6, 2)
    torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(6))
    first = queue.rows.clone()
    for step in range(2):
        queue.push(torch.full((2, 2), float(step)), step, APPLIED)
    assert queue.rows[:4].tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert torch.equal(queue.rows[4:], first[4:])
    for step in range(2, 4):
        queue.push(torch.full((2, 2), float(step)), step, APPLIED)
    assert queue.rows[:, 0].tolist() == [3, 3, 1, 1, 2, 2]
    assert [queue.age(step, 2) for step in (0, 2, 3, 50)] == [0, 2, 3, 3]


def test_a_skipped_step_leaves_the_queue_alone() -> None:
    queue = FeatureQueue(6, 2)
    before = queue.rows.clone()
    queue.push(torch.full((2, 2), math.nan), 1, SKIPPED)
    assert torch.equal(queue.rows, before)
    queue.push(torch.ones(2, 2), 2, APPLIED)  # the place follows from the step, whatever was skipped
    assert queue.rows[4:].tolist() == [[1, 1], [1, 1]]


def test_nothing_but_the_rows_is_in_a_checkpoint() -> None:
    assert list(FeatureQueue(4, 2).state_dict()) == ["rows"]
