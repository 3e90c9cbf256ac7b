"""Which samples a process reads: all processes together see each global batch once, and a machine knows its own."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sampling.order import Order, epoch_order
from pipeline.sampling.sampler import BatchSampler, World, batch_ids

CPU = torch.device("cpu")


def processes(world_size: int, local_world_size: int) -> list[World]:
    """Numbered as torchrun does: the processes of a machine in a row."""
    return [World(rank, world_size, rank % local_world_size, local_world_size, CPU) for rank in range(world_size)]


def seen(
    sampler: BatchSampler, num_samples: int, order: Order, process: World
) -> dict[tuple[int, int], list[list[int]]]:
    """The micro-batches of each (epoch, step)."""
    found: dict[tuple[int, int], list[list[int]]] = {}
    for epoch, step, ids, _ in sampler.batches(num_samples, order, process):
        found.setdefault((epoch, step), []).append(ids.tolist())
    return found


@given(
    machines=st.integers(1, 4),
    local=st.integers(1, 4),
    accumulate=st.integers(1, 3),
    micro=st.integers(1, 3),
    rest=st.integers(0, 5),
    seed=st.integers(0, 2**64 - 1),
)
def test_the_processes_share_each_global_batch(
    machines: int, local: int, accumulate: int, micro: int, rest: int, seed: int
) -> None:
    world = machines * local
    batch = world * accumulate * micro
    samples = 2 * batch + rest % batch
    order = partial(epoch_order, samples, seed)
    sampler = BatchSampler(seed, batch, epochs=2, accumulate=accumulate)
    assert sampler.micro_batch(world) == micro
    ranks = processes(world, local)
    parts = [seen(sampler, samples, order, process) for process in ranks]
    on_all_ranks = [list(sampler.machine_ids(samples, order, process)) for process in ranks]
    places = [(epoch, step) for epoch in range(2) for step in range(2)]
    for number, (epoch, step) in enumerate(places):
        whole = batch_ids(samples, seed, epoch, step, batch).tolist()
        assert [sample for part in parts for ids in part[epoch, step] for sample in ids] == whole
        assert all([len(ids) for ids in part[epoch, step]] == [micro] * accumulate for part in parts)
        for first in range(0, world, local):
            of_machine = [s for part in parts[first : first + local] for ids in part[epoch, step] for s in ids]
            assert all(on_all_ranks[rank][number].tolist() == of_machine for rank in range(first, first + local))
    assert all(list(part) == places for part in parts)
    assert all(len(steps) == len(places) for steps in on_all_ranks)


@pytest.mark.parametrize(("epoch", "step"), [(0, 0), (0, 3), (0, 4), (1, 0), (1, 2), (2, 0)])
def test_a_later_start_leaves_out_what_came_before(epoch: int, step: int) -> None:
    order, alone = partial(epoch_order, 43, 1), World.alone(CPU)
    whole = seen(BatchSampler(1, 10, epochs=2), 43, order, alone)
    later = seen(BatchSampler(1, 10, 2, start_epoch=epoch, start_step=step), 43, order, alone)
    assert later == {place: ids for place, ids in whole.items() if place >= (epoch, step)}


def test_a_batch_that_the_processes_cannot_share_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        BatchSampler(0, 10, epochs=1).micro_batch(world_size=4)


def test_micro_batches_that_cannot_be_equal_differ_by_one() -> None:
    order, sampler, (first, second) = (
        partial(epoch_order, 30, 0),
        BatchSampler(0, 22, epochs=1, accumulate=3),
        processes(2, 2),
    )
    assert sampler.micro_batch(2) == 4
    parts = [*seen(sampler, 30, order, first)[0, 0], *seen(sampler, 30, order, second)[0, 0]]
    assert [len(ids) for ids in parts] == [4, 4, 3, 4, 4, 3]
    assert [sample for ids in parts for sample in ids] == batch_ids(30, 0, 0, 0, 22).tolist()


def test_fewer_samples_than_a_batch_are_no_step() -> None:
    order, alone = partial(epoch_order, 9, 0), World.alone(CPU)
    assert seen(BatchSampler(0, 10, epochs=3), 9, order, alone) == {}
    assert [len(ids) for ids in BatchSampler(0, 10, epochs=3).machine_ids(9, order, alone)] == []
