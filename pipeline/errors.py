"""Owns the one exception that means 'the user can fix this': scripts print its message and exit with code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(ValueError):
    """A user's mistake. The message names the value, the rule and the remedy; no traceback is shown."""


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run a script's ``main``; a ``UserError`` becomes one message on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
