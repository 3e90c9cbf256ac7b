"""Ranks that are asked to stop at different times stop after the same step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.faults import test_hangs
from train.distributed.collectives import FlagConsensus
from train.distributed.process_group import DistContext

VOTES = """
import json, sys
import train.openmp
from train.distributed.collectives import FlagConsensus
from train.distributed.process_group import distributed

with distributed("cpu") as dist:
    consensus = FlagConsensus(dist, lag={lag})
    heard = [
        consensus.any_rank(dist.rank == 1 and step >= 4, dist.rank == 0 and step == 9, False) for step in range(14)
    ]
print(json.dumps(heard))
"""


@pytest.mark.parametrize("lag", [0, 2])
def test_all_ranks_hear_of_a_flag_at_the_same_step(lag: int, tmp_path: Path) -> None:
    test_hangs.PORT.clear()
    script = tmp_path / "votes.py"
    script.write_text(VOTES.format(lag=lag))
    started = [test_hangs.start(script, [], tmp_path, rank, 2) for rank in (0, 1)]
    heard = []
    for process, said in started:
        assert process.wait(timeout=240) == 0, said()
        heard.append(json.loads(said().splitlines()[-1]))
    assert heard[0] == heard[1]
    first = [step for step, flags in enumerate(heard[0]) if flags[0]]
    if lag == 0:
        assert first == list(range(4, 14))
        assert [step for step, flags in enumerate(heard[0]) if flags[1]] == [9]
    else:
        assert first == [6, 9, 12]  # votes that were under way when a flag was heard are forgotten
    assert not any(flags[2] for flags in heard[0])


def test_one_process_hears_itself_at_once() -> None:
    consensus = FlagConsensus(DistContext.alone(torch.device("cpu")), lag=2)
    assert consensus.any_rank(True, False) == (True, False)
