"""What is saved is the state at the time of saving, whatever training does meanwhile; a failed write is never lost."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from tests.train.test_pretrain import flags, losses, run_here
from train.engine import run as run_module
from train.monitoring.reporter import Reporter, StepResult
from train.storage.checkpoints import CheckpointWriter, host_copy, load_checkpoint, save_checkpoint


def test_a_copy_keeps_values_and_layout_while_the_state_moves_on() -> None:
    weight = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    state = {"model": {"w": weight}, "optimizer": {0: {"momentum_buffer": None, "parts": [weight[0]]}}, "step": 3}
    before = weight.clone()
    copy = host_copy(state)
    weight.zero_()
    got = copy()
    assert torch.equal(got["model"]["w"], before)
    assert got["model"]["w"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(got["optimizer"][0]["parts"][0], before[0])
    assert got["optimizer"][0]["momentum_buffer"] is None
    assert got["step"] == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_copy_from_a_gpu_is_of_the_time_when_it_was_asked_for() -> None:
    weight = torch.zeros(1 << 24, device="cuda")
    for _ in range(100):
        weight += 1
    copy = host_copy({"w": weight})
    for _ in range(100):
        weight += 1
    got = copy()["w"]
    assert not got.is_cuda
    assert bool((got == 100).all())


def fail() -> Path:
    raise OSError("no room")


def test_a_failed_write_is_told_when_asked_for_and_once() -> None:
    with CheckpointWriter() as writer:
        writer.start(lambda: Path("first"))
        assert writer.wait() == Path("first")
        writer.start(fail)
        with pytest.raises(OSError, match="no room"):
            writer.wait()
        assert not writer.has_failed()
        assert writer.wait() == Path("first")


def fail_twice(writer: CheckpointWriter) -> None:
    with writer:
        writer.start(fail)
        raise KeyError


def test_a_failed_write_is_told_where_nobody_asked(capsys: pytest.CaptureFixture[str]) -> None:
    writer = CheckpointWriter()
    with pytest.raises(OSError, match="no room"), writer:
        writer.start(fail)
    with pytest.raises(KeyError):
        fail_twice(CheckpointWriter())
    assert "error: no room" in capsys.readouterr().err


def test_leaving_waits_for_the_write(tmp_path: Path) -> None:
    go_on = threading.Event()

    def write() -> Path:
        assert go_on.wait(60)
        (tmp_path / "written").touch()
        return tmp_path

    with CheckpointWriter() as writer:
        writer.start(write)
        assert not writer.has_failed()
        threading.Timer(0.1, go_on.set).start()
    assert (tmp_path / "written").exists()


def test_training_goes_on_while_a_checkpoint_is_written(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write after step 3 lasts until step 5 is done; its content is that of step 3 all the same."""
    five_done, report = threading.Event(), Reporter.step

    def step(self: Reporter, number: int, result: StepResult) -> None:
        report(self, number, result)
        if number == 5:
            five_done.set()

    def slow_save(folder: Path, state: dict, number: int, keep: int) -> Path:
        assert five_done.wait(60)
        return save_checkpoint(folder, state, number, keep)

    arguments = flags(photo_dataset_path, tmp_path / "run", "--checkpoint-every", "3steps", "--knn-every", "0")
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "save_checkpoint", slow_save)
        patch.setattr(Reporter, "step", step)
        assert run_here(patch, [*arguments, "--max-steps", "6"]) == 0
    third, sixth = sorted((tmp_path / "run" / "checkpoints").iterdir())
    sixth.unlink()
    assert load_checkpoint(third)["step"] == 3
    before = losses(tmp_path / "run")
    assert run_here(monkeypatch, [*arguments, "--max-steps", "6", "--resume"]) == 0
    assert losses(tmp_path / "run") == before
