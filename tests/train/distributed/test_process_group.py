"""How the processes of a run leave: all told of a mistake once, and none kept waiting by one that failed alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as td

from pipeline.common.errors import UserError
from tests.helpers.sessions import two_ranks
from train.distributed import process_group as dist_module
from train.distributed.process_group import Launch, RankStatus, SharedError, distributed, exit_once, read_launch


@pytest.fixture
def destroyed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calls of destroy_process_group in a run of two processes on GPUs, where nothing is joined in truth."""
    calls: list[str] = []
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist_module, "choose_device", lambda *_: torch.device("cuda", 0))
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
        raise SharedError("too few images", prints=True)
    assert destroyed == ["nccl", "destroy"]


@pytest.mark.parametrize("kind", [UserError, RuntimeError, KeyboardInterrupt])
def test_one_that_fails_alone_on_a_gpu_does_not_wait_for_the_others(
    destroyed: list[str], kind: type[BaseException]
) -> None:
    """NCCL's destruction is a collective: the message would come after a time-out, or never."""
    with pytest.raises(kind), distributed("cuda"):
        raise kind
    assert destroyed == ["nccl"]


def test_silent_ranks_exit_after_the_one_that_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(dist_module.time, "sleep", slept.append)
    with pytest.raises(SystemExit) as left, exit_once():
        raise SharedError("no GPU", prints=False)
    assert (left.value.code, slept) == (2, [dist_module.SILENT_S])
    with pytest.raises(SharedError), exit_once():
        raise SharedError("no GPU", prints=True)
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
def test_the_error_of_a_late_rank_0_is_still_printed(tmp_path: Path) -> None:
    done = two_ranks(LATE, tmp_path, "--data", tmp_path, "--run-dir", tmp_path / "run", "--device", "cuda")
    assert done.stderr.count("error: --device cuda, but PyTorch finds no GPU here") == 1
    assert done.returncode == 1  # torchrun's own


def launched(**variables: str) -> dict[str, str]:
    return {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **variables}


def test_the_variables_of_torchrun_are_read() -> None:
    assert read_launch({}) == Launch()
    assert read_launch({"SLURM_NTASKS": "1"}) == Launch()
    assert read_launch(launched(SLURM_NTASKS="8")) == Launch(1, 4, 1, 2)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, r"RANK=0, but WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE not set: start with torchrun"),
        ({"WORLD_SIZE": "2"}, r"WORLD_SIZE=2, but RANK"),
        ({"LOCAL_RANK": "0"}, r"LOCAL_RANK=0, but RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, r"but LOCAL_WORLD_SIZE not set"),
        (launched(RANK="four"), r"RANK=four, WORLD_SIZE=4.* describe no process of a run"),
        (launched(RANK=""), r"describe no process"),
        (launched(RANK="4"), r"describe no process"),
        (launched(RANK="-1"), r"describe no process"),
        (launched(WORLD_SIZE="0"), r"describe no process"),
        (launched(LOCAL_RANK="2"), r"describe no process"),
        ({"SLURM_NTASKS": "8"}, r"SLURM_NTASKS is 8, but torchrun's RANK is not set.*SLURM_NTASKS=1"),
    ],
)
def test_a_half_set_environment_is_one_line(variables: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_launch(variables)
    assert "\n" not in str(error.value)


def test_a_compilation_is_no_hang() -> None:
    now = [0.0]
    status, ages = RankStatus(clock=lambda: now[0]), []
    status.follow_compiler()

    def backend(graph: Any, inputs: list[torch.Tensor]) -> Any:
        now[0] += 1000.0  # of compiling
        ages.append(status.age_s())
        return graph.forward

    status.wait("step 1")
    now[0] += 5.0
    torch.compile(lambda x: x.sin() + 1, backend=backend)(torch.ones(2))
    assert ages == [0.0]
    assert status.age_s() == 0.0  # counts from the end of the compilation
    now[0] += 7.0
    assert status.age_s() == 7.0
    assert status.now.what == "step 1"
