"""A user's mistake under torchrun is shown once, as the root cause, and is not tried again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.common import secrets, torchrun
from pipeline.common.errors import UserError, exit_on_user_error
from train import pretrain

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import os, sys, time
from pipeline.common.errors import UserError, exit_on_user_error

def main():
    with open({starts!r}, "a") as file:
        file.write(os.environ["RANK"])
    if os.environ["RANK"] == "0":
        while len(set(open({starts!r}).read()[-2:])) < 2:  # the other one has started too
            time.sleep(0.05)
        raise {error}("--seed -1: it must be at least 0")
    time.sleep(100)  # until it is stopped
    sys.exit(2)

exit_on_user_error(main)
"""


def launched(folder: Path, error: str, restarts: int, *, wrapped: bool = False) -> tuple[str, str]:
    """torchrun's stderr, and the ranks that were started."""
    starts, script, shell = (folder / name for name in ("starts", "script.py", "run.sh"))
    script.write_text(SCRIPT.format(starts=str(starts), error=error))
    shell.write_text(f"{sys.executable} {script}\nexit $?\n")
    command = ["--no-python", "bash", str(shell)] if wrapped else [str(script)]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            f"--max-restarts={restarts}",
            *command,
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode != 0
    return done.stderr, starts.read_text()


@pytest.mark.parametrize(("restarts", "wrapped"), [(0, False), (3, False), (3, True)])
def test_a_mistake_is_the_root_cause_and_is_not_restarted(restarts: int, wrapped: bool, tmp_path: Path) -> None:
    told, started = launched(tmp_path, "UserError", restarts, wrapped=wrapped)
    assert sorted(started) == ["0", "1"]
    assert told.count("--seed -1: it must be at least 0") == 1
    cause = told[told.index("Root Cause (first observed failure):") :]
    assert "exitcode  : 2" in cause
    assert "traceback : error: --seed -1: it must be at least 0" in cause
    assert ("is stopped: a restart would end alike" in told) == (restarts > 0)


def test_what_is_no_mistake_is_restarted(tmp_path: Path) -> None:
    _, started = launched(tmp_path, "RuntimeError", 1)
    assert sorted(started) == ["0", "0", "1", "1"]


@pytest.fixture
def agents(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The variables of a process under torchrun with restarts left; those agents that were stopped."""
    stopped: list[int] = []
    for name, value in {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv(torchrun.ERROR_FILE, str(tmp_path / "error.json"))
    monkeypatch.setattr(torchrun, "_agent", lambda: 4711)
    monkeypatch.setattr(torchrun, "_stop", stopped.append)
    return stopped


def leave(code: object) -> None:
    with pytest.raises(SystemExit):
        exit_on_user_error(lambda: sys.exit(code))  # type: ignore[arg-type]


def test_the_first_process_of_each_machine_stops_its_agent(agents: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    for code in (0, 1, 70, 75):  # none of them a mistake
        leave(code)
    assert agents == []
    leave(2)
    assert agents == [4711]
    monkeypatch.setenv("LOCAL_RANK", "1")
    leave(2)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "3")  # it will not restart anyway
    leave(2)
    assert agents == [4711]


def test_a_wrong_flag_is_the_root_cause_too(
    agents: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--data", "x", "--run-dir", "y", "--sedd", "3"])
    with pytest.raises(SystemExit) as left:
        exit_on_user_error(pretrain.main)
    assert left.value.code == 2
    assert agents == [4711]
    told = capsys.readouterr().err
    assert told.count("Unrecognized options: --sedd, 3") == 1
    assert "Root Cause" in told
    assert "│" not in told


def test_no_secret_comes_into_the_record(agents: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    word = "open" + "sesame"
    monkeypatch.setattr(secrets, "_concealed", {})
    monkeypatch.setattr(secrets, "_words", set())
    secrets.conceal(f"s3://name:{word}@bucket/folder")

    def main() -> None:
        raise UserError(f"{word} is no dataset")

    with pytest.raises(SystemExit):
        exit_on_user_error(main)
    record = (tmp_path / "error.json").read_text()
    assert word not in record
    assert json.loads(record)["message"]["message"] == "*** is no dataset"
