"""This project's own commands, for child processes: scripts in a checkout, the console command in a wheel.

Which one it is follows from the text alone: inside `siamstream` every `python tools/make_shards.py` in these files
reads `siamstream shard` (siamstream/naming.py).
"""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def after_python(command: str) -> list[str]:
    """What follows the interpreter's name to run ``command``, which is ``python SCRIPT`` or ``siamstream VERB``."""
    program, name = command.split()
    return ["-m", "siamstream", name] if program == "siamstream" else [os.path.relpath(ROOT / name)]
