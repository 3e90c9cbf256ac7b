"""Set OpenMP's waiting policy. Import this module before torch, which reads it once.

On a CPU the loader and torch share the cores. By default OpenMP's threads spin while they wait for each other, and so
take the cores from the loader and from other processes.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
