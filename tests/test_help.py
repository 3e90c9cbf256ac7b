"""--help says of every flag of every command what it is."""

from __future__ import annotations

import re

import pytest
import tyro

from tools import (
    check_shards,
    demo,
    export_backbone,
    make_shards,
    plot_run,
    preview_views,
)
from tools.reproduction import sweep as sweep_module
from tools.throughput import workload as workload_module
from train.config.run_config import PretrainConfig
from train.knn import KnnEvalConfig
from train.linear import LinearConfig

COMMANDS = [
    PretrainConfig,
    LinearConfig,
    KnnEvalConfig,
    make_shards.Command,
    check_shards.Command,
    demo.DemoConfig,
    export_backbone.ExportConfig,
    plot_run.PlotConfig,
    preview_views.PreviewConfig,
    workload_module.ProfileConfig,
    sweep_module.ReproduceConfig,
]
ENTRY = re.compile(r"(--?[a-z]|\[?[A-Z{|]{2,})")  # a flag or a positional argument, at the left edge of its box


def entries(text: str) -> dict[str, str]:
    """Flag -> its help, without the default, out of what tyro prints in boxes."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        border, inner = line[:2], line[2:-1].rstrip()
        if border not in ("│ ", "  "):  # to a terminal, and to a file
            continue
        if ENTRY.match(inner):
            name, _, rest = re.sub(r" {2,}", "\0", inner, count=1).partition("\0")
            found[name] = rest
        elif inner.startswith("  ") and found:
            found[list(found)[-1]] += " " + inner.strip()
    return {name: re.sub(r"\((default: .*|required)\)$", "", text).strip() for name, text in found.items()}


def test_help_is_taken_apart() -> None:
    text = """
╭─ options ───────────────╮
│ --a INT     first one   │
│             (default: 1)│
│ --long-name {x,y}       │
│             (default: x)│
╰─────────────────────────╯"""
    assert entries(text) == {"--a INT": "first one", "--long-name {x,y}": ""}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__module__)
def test_every_flag_says_what_it_is(command: type, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tyro.cli(command, args=["--help"])
    said = entries(capsys.readouterr().out)
    assert len(said) > 2  # they were found at all
    assert [name for name, text in said.items() if not text] == []
