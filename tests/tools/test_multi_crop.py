"""The benchmark of multi-crop measures all stages and both recipes, at toy size."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "multi_crop.py"


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["multi_crop.py", *words])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_every_stage_is_measured_for_both_recipes_and_decoding_once(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.json"
    run(monkeypatch, str(photo_dataset_path), "--batch", "16", "--repeats", "1", "--json", str(file))
    assert "48 images a run, 1 runs each in turn" in capsys.readouterr().out
    results = json.loads(file.read_text())
    for stage in ("crops", "photometric", "loader"):
        two, multi = (results[f"{stage}, {name}"]["images_per_s"]["median"] for name in ("2 x 224", "2 x 224 + 6 x 96"))
        assert results[f"{stage}, ratio"]["time"]["median"] == pytest.approx(two / multi)
    assert [name for name in results if name.startswith("decode")] == ["decode, 2 x 224"]


@pytest.mark.parametrize("words", [["--batch", "0"], ["--repeats", "0"], ["--batch", "49"]])
def test_mistakes_of_a_user(
    words: list[str], photo_dataset_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, str(photo_dataset_path), *words)
    assert caught.value.code == 2
    assert " ".join(words) in capsys.readouterr().err
