"""The image of the views: its size follows from what was asked for, and mistakes are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.toy_runs import call
from tools import preview_views


def test_a_row_for_each_sample(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    heights, data = [], str(photo_dataset_path)
    options = ["--image-size", "16", "--backend", "torchvision"]
    for samples in ("2", "4"):
        out = tmp_path / f"{samples}.png"
        assert call(monkeypatch, preview_views, data, out, "--samples", samples, *options) == 0
        with Image.open(out) as image:
            heights.append(image.height)
            colours = image.convert("RGB").getcolors(maxcolors=1 << 20)
        assert colours is not None
        assert len(colours) > 1000  # of photographs, not of an empty page
    assert heights[1] > 1.5 * heights[0]
    assert "4 images and their views by torchvision" in capsys.readouterr().out


MISTAKES = {
    ("x.png", "--samples", "0"): "--samples 0: ",
    ("x.png", "--samples", "49"): "has 48; choose 1 up to that",
    ("x.png", "--seed", "-1"): "--seed -1: it must lie in 0 .. 2**64 - 1",
    ("x.png", "--epoch", "-1"): "--epoch -1: epochs are numbered 0 .. ",
    ("x.png", "--epoch", "5000000000"): "--epoch 5000000000: epochs are numbered 0 .. ",
    ("x.jpg",): "the image is written as PNG",
}


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_mistakes(
    arguments: tuple[str, ...], photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out, *more = arguments
    assert call(monkeypatch, preview_views, photo_dataset_path, tmp_path / out, *more) == 2
    assert MISTAKES[arguments] in capsys.readouterr().err
    assert not (tmp_path / out).exists()
