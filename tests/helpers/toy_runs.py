"""Calls scripts in the test's process, and the flags of a training run that takes a moment."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from pipeline.common.errors import exit_on_user_error

HEADS = ["--dim", "16", "--projector-hidden", "16", "--predictor-hidden", "4"]
TINY = ["--backbone", "resnet_tiny", "--image-size", "16", *HEADS]
CPU = ["--device", "cpu", "--threads", "1"]


def call(monkeypatch: pytest.MonkeyPatch, script: ModuleType, *arguments: object) -> int:
    """The exit code of the script's command."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__.rpartition('.')[2]}.py", *map(str, arguments)])
    try:
        exit_on_user_error(script.main)
    except SystemExit as end:
        return int(end.code or 0)
    return 0
