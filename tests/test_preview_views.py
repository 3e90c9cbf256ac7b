"""The picture of the views: its size follows from what was asked for, and mistakes are told."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.errors import exit_on_user_error
from tools import preview_views


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["preview_views.py", *arguments])
    try:
        exit_on_user_error(preview_views.main)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_row_for_each_sample(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    heights, data = [], str(photo_dataset_path)
    options = ["--image-size", "16", "--backend", "torchvision"]
    for samples in ("2", "4"):
        out = tmp_path / f"{samples}.png"
        assert run(monkeypatch, data, str(out), "--samples", samples, *options) == 0
        with Image.open(out) as picture:
            heights.append(picture.height)
            colours = picture.convert("RGB").getcolors(maxcolors=1 << 20)
        assert colours is not None
        assert len(colours) > 1000  # of photographs, not of an empty page
    assert heights[1] > 1.5 * heights[0]
    assert "4 pictures and their views by torchvision" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--samples", "0"], "--samples 0: "),
        (["--samples", "49"], "has 48; choose 1 up to that"),
        (["--seed", "-1"], "--seed -1: it must lie in 0 .. 2**64 - 1"),
        (["--epoch", "-1"], "--epoch -1: epochs are numbered 0 .. "),
        (["--epoch", "5000000000"], "--epoch 5000000000: epochs are numbered 0 .. "),
    ],
)
def test_mistakes(
    photo_dataset_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    more: list[str],
    message: str,
) -> None:
    assert run(monkeypatch, str(photo_dataset_path), str(tmp_path / "x.png"), *more) == 2
    assert message in capsys.readouterr().err


def test_another_kind_of_picture(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert run(monkeypatch, str(photo_dataset_path), str(tmp_path / "x.jpg")) == 2
    assert "the picture is written as PNG" in capsys.readouterr().err
    assert not (tmp_path / "x.jpg").exists()
