"""--help says of every flag of every command what it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tyro

from model.backbone import BACKBONES
from tools import (
    check_shards,
    demo,
    embed,
    export_backbone,
    make_shards,
    neighbours,
    plot_run,
    predict,
    preview_views,
    report,
)
from tools.reproduction import sweep as sweep_module
from tools.throughput import workload as workload_module
from train.config.recipes import parse_config
from train.config.run_config import PretrainConfig
from train.finetune import FinetuneConfig
from train.knn import KnnEvalConfig
from train.linear import LinearConfig

COMMANDS = [
    PretrainConfig,
    LinearConfig,
    KnnEvalConfig,
    FinetuneConfig,
    embed.EmbedConfig,
    neighbours.NeighboursConfig,
    predict.PredictConfig,
    report.ReportConfig,
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


# A help text says first what the flag does; where its default comes from stands behind that.
NOT_A_BEGINNING = re.compile(
    r"(section|table|figure|appendix|chen|wu|you|arxiv|of|for|with|in|on|that|which|where|when|if|the same|as|at|by|px"
    r"|between|horizontal|gaussian|cosine|see)\b|\W|\d",
    re.IGNORECASE,
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__module__)
def test_every_help_text_begins_with_what_the_flag_does(command: type, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tyro.cli(command, args=["--help"])
    said = entries(capsys.readouterr().out)
    assert [f"{name}: {text}" for name, text in said.items() if NOT_A_BEGINNING.match(text)] == []
    assert [f"{name}: {text}" for name, text in said.items() if text[0].islower() and not text.startswith("show")] == []


def test_flags_of_a_component_stand_in_a_box_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tyro.cli(LinearConfig, args=["--help"])
    text = capsys.readouterr().out
    for box in ("encoder", "classifier", "loader", "remote"):
        assert f"{box} options" in text
    assert "--loader." not in text


GOLDEN = Path(__file__).parent / "data" / "pretrain_help.txt"


def test_the_help_of_pretraining_is_the_recorded_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a change that is meant: COLUMNS=100 python train/pretrain.py --help > tests/data/pretrain_help.txt."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("sys.argv", ["train/pretrain.py"])
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    assert words(capsys.readouterr().out) == words(GOLDEN.read_text(encoding="utf-8"))


def words(text: str) -> list[str]:
    """What stands in the boxes, however they are drawn."""
    return re.sub("[─│╭╮╰╯]|-{3,}", " ", text).split()


@pytest.mark.parametrize(("alias", "flag"), [("--batch-size", "global_batch"), ("--lr", "base_lr")])
def test_common_names_of_flags_are_taken(alias: str, flag: str) -> None:
    config: Any = parse_config(["--data", "d", "--run-dir", "r", alias, "64"])
    assert getattr(config, flag, None) == 64 or getattr(config.optim, flag) == 64


def test_the_help_lists_every_backbone() -> None:
    listed = set(re.findall(r"[\w]+", GOLDEN.read_text(encoding="utf-8")))
    assert set(BACKBONES) <= listed
