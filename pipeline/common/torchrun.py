"""A user's mistake under torchrun: shown once, as the root cause in torchrun's report, and not tried again.

torchrun's agent starts all processes again after any failure, --max-restarts times, and prints its report after the
last. No exit code keeps it from that, so a process that ends by a mistake prints the report itself and stops the agent.
The record is that of torch.distributed.elastic.multiprocessing.errors.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from pipeline.common.text import printable

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # the variable in which a process finds the path of its record
_AGENTS = ("torch.distributed.run", "torch.distributed.launch", "torchrun", "accelerate")


def is_above() -> bool:
    """Whether torchrun has started this process."""
    return ERROR_FILE in os.environ


def report(message: str) -> bool:
    """Record a mistake and keep torchrun from a restart. Returns whether the message is shown, now or by torchrun."""
    file = os.environ.get(ERROR_FILE)
    if file is None or not _record(message, Path(file)):
        return False
    if not _restarts_left():
        return True
    agent = _agent()
    if agent is None:
        return False
    print(_root_cause(file), file=sys.stderr, flush=True)
    print(f"torchrun (process {agent}) is stopped: a restart would end alike", file=sys.stderr, flush=True)
    _stop(agent)
    return True


def leave_quietly() -> None:
    """Keep torchrun from a restart after a mistake that another process reports, perhaps on another machine.

    To be called by all processes: the first of each machine stops that machine's agent, once.
    """
    if is_above() and os.environ.get("LOCAL_RANK") == "0" and _restarts_left() and (agent := _agent()) is not None:
        _stop(agent)


def _record(message: str, file: Path) -> bool:
    """Write the message where the agent looks for it. It shows what is called the call stack."""
    about = {"py_callstack": f"error: {message}", "timestamp": str(int(time.time()))}
    try:
        file.write_text(json.dumps({"message": {"message": message, "extraInfo": about}}), encoding="utf-8")
    except OSError:
        return False
    return True


def _restarts_left() -> bool:
    counts = [os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RESTART_COUNT", "MAX_RESTARTS")]
    return all(count.isdecimal() for count in counts) and int(counts[0]) < int(counts[1])


def _root_cause(file: str) -> str:
    """The report that the agent would print after the last restart."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    rank, local_rank = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK"))
    failure = ProcessFailure(local_rank=local_rank, pid=os.getpid(), exitcode=2, error_file=file)
    return str(ChildFailedError(printable(sys.argv[0]), {rank: failure}))


def _stop(agent: int) -> None:
    with contextlib.suppress(OSError):  # it is gone already
        os.kill(agent, signal.SIGTERM)


def _agent() -> int | None:
    """The process of torchrun above this one; there may be others between, as a shell script. None if it is not found.

    Without /proc (macOS) the parent is taken for it.
    """
    pid = os.getppid()
    if not Path("/proc/self/stat").exists():
        return pid
    while pid > 1:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            above = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1]
        except OSError:
            return None
        if any(word in _AGENTS or Path(word).name in _AGENTS for word in words):
            return pid
        pid = int(above)
    return None
