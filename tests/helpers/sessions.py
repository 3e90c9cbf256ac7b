"""Runs the training script in processes that may be killed: each is a fork of one that has imported everything.

A fork starts in a tenth of a second, where a fresh Python would first import torch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def two_ranks(script: str, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Python text in place of the training script, under torchrun; ``folder`` is a place for it."""
    path = folder / "script.py"
    path.write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command += map(str, arguments)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment, check=False)


PARENT = """
import train.openmp
import json, os, sys
from train import pretrain
from pipeline.common.errors import exit_on_user_error
sys.path.insert(0, "tests")
from tests.helpers import sabotage
import torch.utils.tensorboard

for line in sys.stdin:
    task = json.loads(line)
    child = os.fork()
    if child == 0:
        output = os.open(task["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(output, 1), os.dup2(output, 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = ["pretrain.py", *task["arguments"]]
        code = 1
        try:
            sabotage.arm(*task["sabotage"])
            exit_on_user_error(pretrain.main)
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Sessions:
    """Runs the training script again and again, one after the other."""

    def __init__(self, folder: Path, more_environment: dict[str, str] | None = None) -> None:
        """What the runs print goes to ``folder``/output."""
        self.output = folder / "output"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(more_environment or {})}
        self._parent = subprocess.Popen(
            [sys.executable, "-c", PARENT],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, arguments: list[str], *sabotage: Any) -> int:
        """The exit code of one run, negative for a signal. ``sabotage``: arguments of ``sabotage.arm``."""
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        task = {"arguments": arguments, "sabotage": sabotage, "output": str(self.output)}
        self._parent.stdin.write(json.dumps(task) + "\n")
        self._parent.stdin.flush()
        return int(self._parent.stdout.readline())

    def said(self) -> str:
        """All that the runs have printed so far."""
        return self.output.read_text()

    def close(self) -> None:
        """End the parent process."""
        assert self._parent.stdin is not None
        self._parent.stdin.close()
        self._parent.wait(timeout=60)


KILL, TERM = signal.SIGKILL, signal.SIGTERM
