"""Let SIGTERM, SIGINT and SIGUSR1 end the trainer with exit code 75 from its first line on, while it imports torch.

Import this module before all that takes time. Imported by another program it changes nothing.
train/distributed/stop_signals.py takes over when the run is built.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

EXIT_PREEMPTED = 75  # sysexits.h EX_TEMPFAIL: "try again later"
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
_TRAINERS = ("pretrain.py", "siamstream pretrain")  # as sys.argv names them


def _leave(number: int, _frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    os.write(2, f"stopped by {name} before the first step; start again with --resume\n".encode())
    os._exit(EXIT_PREEMPTED)


if Path(sys.argv[0]).name in _TRAINERS and threading.current_thread() is threading.main_thread():
    for _number in STOP_SIGNALS:
        if signal.getsignal(_number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(_number, _leave)
