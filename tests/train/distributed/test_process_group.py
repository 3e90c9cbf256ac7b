"""How the processes of a run leave: all told of a mistake once, and none kept waiting by one that failed alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as td

from pipeline.common.errors import UserError
from tests.helpers.sessions import two_ranks
from train.distributed import process_group as dist_module
from train.distributed.process_group import SharedError, distributed, exit_once


@pytest.fixture
def destroyed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calls of destroy_process_group in a run of two processes on GPUs, where nothing is joined in truth."""
    calls: list[str] = []
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist_module, "_device", lambda *_: torch.device("cuda", 0))
    monkeypatch.setattr(dist_module, "_fresh_store", lambda: td.HashStore())
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(td, "init_process_group", lambda backend, **options: calls.append(backend))
    monkeypatch.setattr(td, "barrier", lambda: calls.append("barrier"))
    monkeypatch.setattr(td, "destroy_process_group", lambda: calls.append("destroy"))
    return calls


def test_processes_on_gpus_leave_together(destroyed: list[str]) -> None:
    with distributed("cuda"):
        pass
    assert destroyed == ["nccl", "barrier", "destroy"]


def test_a_mistake_that_all_know_of_leaves_nothing_behind(destroyed: list[str]) -> None:
    with pytest.raises(SharedError), distributed("cuda"):
        raise SharedError("too few images", speaks=True)
    assert destroyed == ["nccl", "destroy"]


@pytest.mark.parametrize("kind", [UserError, RuntimeError, KeyboardInterrupt])
def test_one_that_fails_alone_on_a_gpu_does_not_wait_for_the_others(
    destroyed: list[str], kind: type[BaseException]
) -> None:
    """NCCL's destruction is a collective: the message would come after a time-out, or never."""
    with pytest.raises(kind), distributed("cuda"):
        raise kind
    assert destroyed == ["nccl"]


def test_who_does_not_speak_lets_the_one_that_does_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(dist_module.time, "sleep", slept.append)
    with pytest.raises(SystemExit) as left, exit_once():
        raise SharedError("no GPU", speaks=False)
    assert (left.value.code, slept) == (2, [dist_module.SILENT_S])
    with pytest.raises(SharedError), exit_once():
        raise SharedError("no GPU", speaks=True)
    assert len(slept) == 1


LATE = """
import os, sys, time
if os.environ["RANK"] == "0":
    time.sleep(2)  # the imports of rank 0 take longer today
from pipeline.common.errors import exit_on_user_error
from train.pretrain import main
exit_on_user_error(main)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the mistake is to ask for a GPU where there is none")
def test_a_rank_0_that_comes_late_is_still_heard(tmp_path: Path) -> None:
    done = two_ranks(LATE, tmp_path, "--data", tmp_path, "--run-dir", tmp_path / "run", "--device", "cuda")
    assert done.stderr.count("error: --device cuda, but PyTorch finds no GPU here") == 1
    assert done.returncode == 1  # torchrun's own
