"""What a run outlives: its reader, a damaged log, a second process in its folder; and what it records of itself."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.common.errors import exit_on_user_error
from pipeline.common.locations import local_path, location
from pipeline.common.locks import exclusive_lock
from tests.train.test_pretrain import ROOT, STEPS, flags, losses, run_here
from train.distributed import process_group
from train.engine import dry_run
from train.storage.run_folder import LOCK_FILE, METRICS_FILE, read_lines

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = ["--knn-every", "0", "--max-steps"]


def test_a_second_process_is_refused_by_name(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    arguments = flags(photo_dataset_path, tmp_path / "run", *SHORT, "2")
    assert run_here(monkeypatch, arguments) == 0
    before = (tmp_path / "run" / METRICS_FILE).read_bytes()
    with exclusive_lock(tmp_path / "run" / LOCK_FILE, shared=False):
        assert run_here(monkeypatch, [*arguments, "--resume"]) == 2
    told = capsys.readouterr().err
    assert f"process {os.getpid()} on " in told
    assert f"is writing to {tmp_path / 'run'}: wait for it" in told
    assert (tmp_path / "run" / METRICS_FILE).read_bytes() == before
    assert run_here(monkeypatch, [*flags(photo_dataset_path, tmp_path / "run", *SHORT, "3"), "--resume"]) == 0


@pytest.mark.parametrize("damage", [b"{\n", b"\xff\x00\n", b"\n", b"[1]\n", b'{"loss": 1}\n'])
def test_a_damaged_log_never_blocks_a_resume(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, damage: bytes
) -> None:
    assert run_here(monkeypatch, flags(photo_dataset_path, tmp_path / "run", *SHORT, "2")) == 0
    log = tmp_path / "run" / METRICS_FILE
    log.write_bytes(damage + log.read_bytes())
    assert run_here(monkeypatch, flags(photo_dataset_path, tmp_path / "run", *SHORT, "3", "--resume")) == 0
    assert f"line 1 of {log} is damaged" in capsys.readouterr().err
    assert list(losses(tmp_path / "run")) == [1, 2, 3]
    assert log.with_name(log.name + ".damaged").read_bytes().startswith(damage)


def test_a_run_records_when_where_and_with_what(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_here(monkeypatch, flags(photo_dataset_path, tmp_path / "run", *SHORT, "2")) == 0
    session = json.loads((tmp_path / "run" / "config.json").read_text())["session"]
    assert set(session) == {"start", "host", "commit", "versions"}
    assert {"python", "torch"} <= set(session["versions"])
    times = [line["time"] for line in read_lines(tmp_path / "run" / METRICS_FILE)]
    assert times == sorted(times)
    assert times[0] > 1.7e9  # seconds since 1970


@pytest.mark.parametrize("environment", [{}, {"PYTHONIOENCODING": "ascii"}])
def test_a_reader_that_goes_away_costs_no_step(
    photo_dataset_path: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    run = subprocess.Popen(
        [sys.executable, "train/pretrain.py", *flags(photo_dataset_path, tmp_path / "run", "--knn-every", "0")],
        cwd=ROOT,
        env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert run.stdout is not None
    run.stdout.close()
    assert run.wait(timeout=240) == 0
    assert len(losses(tmp_path / "run")) == STEPS


def test_help_into_a_closed_pipe_is_quiet() -> None:
    script = f"set -o pipefail; {sys.executable} train/pretrain.py --help | head -n 1"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_home_folder_is_understood(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert location("~/data") == local_path("~/data") == tmp_path / "data"


def test_torchrun_gets_the_message_of_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))

    def main() -> None:
        with process_group.exit_once():
            raise process_group.SharedError("--seed -1: no", prints=True)

    with pytest.raises(SystemExit) as left:
        exit_on_user_error(main)
    assert left.value.code == 2
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "--seed -1: no"
    assert capsys.readouterr().err == ""  # torchrun prints it


def test_ctrl_c_is_no_traceback(capsys: Any) -> None:
    with pytest.raises(SystemExit) as left, process_group.exit_once():
        raise KeyboardInterrupt
    assert left.value.code == 130
    assert "stopped by Ctrl-C" in capsys.readouterr().err


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_a_dumb_terminal_gets_no_escapes(term: str, photo_dataset_path: Path, tmp_path: Path) -> None:
    main, its_end = pty.openpty()
    run = subprocess.Popen(
        [sys.executable, "train/pretrain.py", *flags(photo_dataset_path, tmp_path / "run", *SHORT, "2")],
        cwd=ROOT,
        env={**os.environ, "TERM": term, "OMP_NUM_THREADS": "1"},
        stdin=its_end,
        stdout=its_end,
        stderr=its_end,
    )
    os.close(its_end)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the run has ended
        while part := os.read(main, 65536):
            shown += part
    os.close(main)
    assert run.wait(timeout=240) == 0
    assert b"epoch 0 step 2/2 loss" in shown
    assert (b"\x1b" in shown) == (term == "xterm")  # which has the line of progress rewritten in place


def test_the_plan_says_when_the_disk_cannot_hold_the_checkpoints(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    arguments = flags(photo_dataset_path, tmp_path / "run", *SHORT)
    assert run_here(monkeypatch, [*arguments, "1", "--keep-checkpoints", "1"]) == 0
    assert "warning:" not in capsys.readouterr().out
    (written,) = (tmp_path / "run" / "checkpoints").iterdir()
    mb = written.stat().st_size / 1e6
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda _: SimpleNamespace(free=int(2 * mb * 1e6)))
    assert run_here(monkeypatch, [*arguments, "2", "--keep-checkpoints", "9", "--resume"]) == 0
    out = capsys.readouterr().out
    said = re.search(r"warning: 9 \+ 1 checkpoints of (\d+) MB need (\d+) MB .*, and (\d+) MB are free", out)
    assert said is not None
    checkpoint, whole, free = map(int, said.groups())
    assert checkpoint == pytest.approx(mb, abs=1)
    assert whole > 10 * checkpoint - 10
    assert free == pytest.approx(3 * mb, abs=1)  # with the room of the checkpoint that is there
    assert out.index("plan for") < said.start()


@pytest.mark.parametrize("script", ["pretrain", "linear", "knn", "finetune"])
def test_what_must_come_before_torch_does(script: str) -> None:
    """OpenMP's policy is read once, when torch is imported; the signals of the trainer's first seconds come then."""
    code = (
        "import importlib, os, sys\n"
        "class AtTorch:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'torch':\n"
        "            print(os.environ.get('OMP_WAIT_POLICY'), 'train.early_signals' in sys.modules)\n"
        "            sys.exit()\n"
        "sys.meta_path.insert(0, AtTorch())\n"
        f"importlib.import_module('train.{script}')\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["PASSIVE", str(script == "pretrain")]
