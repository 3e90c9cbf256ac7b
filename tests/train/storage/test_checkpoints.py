"""Checkpoints are whole or absent, known to be intact, the newest N, and never another run's."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from pipeline.common.errors import UserError
from train.storage.checkpoints import CheckpointTimer, check_same_run, find_checkpoint, load_checkpoint, save_checkpoint


def save(folder: Path, step: int, keep: int = 3) -> Path:
    return save_checkpoint(folder, {"step": step, "model": {"w": torch.full((100,), float(step))}}, step, keep)


def test_round_trip(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    found = find_checkpoint(tmp_path)
    assert found.path == path
    assert found.damaged == ()
    state = load_checkpoint(path)
    assert state["step"] == 5
    assert torch.equal(state["model"]["w"], torch.full((100,), 5.0))


def test_the_newest_n_are_kept(tmp_path: Path) -> None:
    paths = [save(tmp_path, step, keep=2) for step in (9, 10, 100)]
    assert sorted(tmp_path.iterdir()) == sorted(paths[1:])
    assert find_checkpoint(tmp_path).path == paths[2]


def test_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-000000001-0123.pt.tmp-host-1").write_bytes(b"half")
    assert find_checkpoint(tmp_path).path is None
    assert find_checkpoint(tmp_path / "missing").path is None


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_newest_one_is_named_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    data = bytearray(bad.read_bytes())
    data[len(data) // 2] ^= 1
    bad.write_bytes({"flip": bytes(data), "truncate": bytes(data[:-10]), "empty": b""}[damage])
    found = find_checkpoint(tmp_path)
    assert found.path == good
    assert [path.name for path in found.damaged] == [bad.name + ".damaged"]
    assert find_checkpoint(tmp_path).damaged == ()  # set aside: named once


def test_all_damaged_is_a_mistake_that_is_told(tmp_path: Path) -> None:
    save(tmp_path, 1).write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact.*backup.*--run-dir"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_older_checkpoint_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    old = save(tmp_path, 1)

    def full(_: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"writing the checkpoint .*step-000000002.*space"):
            save(tmp_path, 2)
    assert list(tmp_path.iterdir()) == [old]
    assert find_checkpoint(tmp_path).path == old


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, ("touch executed",)

    (tmp_path / "text.pt").write_text("hello")
    torch.save({"format": 1, "x": Code()}, tmp_path / "code.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"format": 99}, tmp_path / "newer.pt")
    for name in ("text", "code", "list", "newer"):
        with pytest.raises(UserError, match=rf"{name}.pt is no checkpoint"):
            load_checkpoint(tmp_path / f"{name}.pt")
    with pytest.raises(UserError, match="cannot read"):
        load_checkpoint(tmp_path / "missing.pt")


def test_another_configuration_is_listed_field_by_field() -> None:
    saved = {"epochs": 3, "seed": 0, "views.hue": 0.1}
    check_same_run(saved, dict(saved), Path("c.pt"))
    with pytest.raises(UserError) as error:
        check_same_run(saved, {"epochs": 4, "seed": 0, "views.hue": 0.2, "optim.base_lr": 1.0}, Path("c.pt"))
    message = str(error.value)
    for part in ("epochs: checkpoint 3, now 4", "views.hue: checkpoint 0.1, now 0.2", "optim.base_lr", "--run-dir"):
        assert part in message
    assert "seed" not in message


def test_timer_by_steps_and_epochs() -> None:
    steps = CheckpointTimer("3steps")
    assert [step for step in range(1, 10) if steps.is_due_at(step, 4)] == [3, 6, 9]
    epochs = CheckpointTimer("2epochs")
    assert [step for step in range(1, 20) if epochs.is_due_at(step, 4)] == [8, 16]
    assert not steps.minutes_over()


def test_timer_by_minutes() -> None:
    now = [0.0]
    timer = CheckpointTimer("10m", clock=lambda: now[0])
    assert not timer.is_due_at(4, 4)
    now[0] = 599.0
    assert not timer.minutes_over()
    now[0] = 600.0
    assert timer.minutes_over()
    timer.saved(7)
    assert not timer.minutes_over()
    assert timer.is_saved(7)
    assert not timer.is_saved(8)


@pytest.mark.parametrize("text", ["", "10", "m", "0steps", "-1epoch", "1.5h"])
def test_timer_refuses_other_texts(text: str) -> None:
    with pytest.raises(UserError, match=r"10m.*500steps.*1epoch"):
        CheckpointTimer(text)
