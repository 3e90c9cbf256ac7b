"""The exception for what a user can fix: scripts print its message and exit with code 2, without a traceback.

A configuration is checked in ``__post_init__`` of its dataclass, with ``require`` and the functions below it.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from pipeline.common import torchrun
from pipeline.common.output import lasting_output
from pipeline.common.secrets import conceal_arguments, scrub
from pipeline.common.text import printable

_NO_MEMORY = re.compile(r"DefaultCPUAllocator: .*you tried to allocate (\d{1,30}) bytes")  # torch raises RuntimeError


class UserError(Exception):
    """A user's mistake. The message names the value, the rule and the remedy; no traceback is shown.

    No ValueError: tyro would take one out of a dataclass's ``__post_init__`` for its own, and print it in a box.
    """


def require(flag: str, value: object, holds: bool, rule: str) -> None:
    """Raise UserError with the rule unless it holds for the value of ``flag``."""
    if not holds:
        raise UserError(f"{flag} {value}: {rule}")


def check_one_copy(script: Path, imported: Path) -> None:
    """Raise UserError if ``script`` lies in one checkout of this project, and Python imports from another one.

    This happens with one environment for two worktrees. An installed copy (no checkout) is never refused.
    """
    own = script.resolve().parent.parent
    checkouts = all((folder / "setup.py").is_file() for folder in (own, imported))
    if checkouts and own != imported.resolve() and (own / "pipeline" / "common" / "errors.py").is_file():
        raise UserError(
            f"{script} is not of the installed copy of siamstream, which is {imported}: run that one's script, "
            f"or install this one with `pip install -e {own}`"
        )


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run a script's ``main``; a ``UserError`` becomes one message on stderr and exit code 2.

    Under torchrun it stands in torchrun's report, and torchrun does not start the processes again. So does an error of
    a file or folder, for which nothing else has found better words, and want of memory on the CPU.
    """
    conceal_arguments()
    with lasting_output():
        try:
            if (script := getattr(sys.modules["__main__"], "__file__", None)) is not None:
                check_one_copy(Path(script), Path(__file__).parents[2])
            main()
        except UserError as error:
            _report(str(error))
            sys.exit(2)
        except OSError as error:
            if error.filename is None:  # of no file or folder: a fault of this program
                raise
            _report(f"{error.strerror}: {os.fsdecode(error.filename)}; look at what is there, then try again")
            sys.exit(2)
        except (MemoryError, RuntimeError) as error:
            wanted = _NO_MEMORY.search(str(error))
            if wanted is None and not isinstance(error, MemoryError):
                raise
            more = f", when it asked for {int(wanted[1]) / 1e9:,.1f} GB more" if wanted is not None else ""
            _report(
                f"the memory of this machine is used up{more}: lower the batch, the image size or the model's sizes"
            )
            sys.exit(2)
        except SystemExit as end:
            if end.code == 2:
                torchrun.leave_quietly()
            raise


def _report(text: str) -> None:
    message = printable(scrub(text))
    if not torchrun.report(message):
        print(f"error: {message}", file=sys.stderr)


SEEDS = 1 << 64  # torch's generators and ours take 64 bits


def check_at_least_1(flag: str, count: int) -> None:
    """Raise UserError unless ``count``, of steps, images or passes, is at least 1."""
    require(flag, count, count >= 1, "it must be at least 1")


def check_divisible(global_batch: int, parts: int, by: str) -> None:
    """Raise UserError unless ``parts``, which ``by`` describes, divide the batch."""
    if global_batch % parts:
        below = max(global_batch // parts, 1) * parts
        raise UserError(
            f"--global-batch {global_batch} cannot be divided by {by}: take a multiple of {parts}, {below} or "
            f"{below + parts} for instance"
        )


def check_seed(seed: int) -> None:
    """Raise UserError unless ``seed``, of weights, order and views, has at most 64 bits."""
    require("--seed", seed, 0 <= seed < SEEDS, "it must lie in 0 .. 2**64 - 1")
