"""The preview shows all views of the recipe that was asked for, with the parameters that were drawn for them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.dataset.dataset import ShardSet
from pipeline.sampling.augmentations import Augmentations, Erasing
from pipeline.sampling.sampler import batch_ids
from pipeline.sampling.views import ViewGroup, ViewRecipe, draw_views
from tests.helpers.toy_runs import call
from tools import preview_views
from tools.preview_views import PreviewConfig
from train.config.recipes import RECIPES
from train.config.run_config import PretrainConfig


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


def shown(
    monkeypatch: pytest.MonkeyPatch, data: Path, out: Path, *words: str
) -> tuple[PreviewConfig, list[str], list[str]]:
    """The configuration, the titles and the texts beneath the images of a preview."""
    figures: list[Any] = []
    draw = preview_views.draw

    def keep(*arguments: Any) -> Any:
        figures.append(draw(*arguments))
        return figures[-1]

    configs: list[PreviewConfig] = []
    cli = preview_views.tyro.cli
    with monkeypatch.context() as patch:
        patch.setattr(preview_views, "draw", keep)
        patch.setattr(preview_views.tyro, "cli", lambda *of, **by: configs.append(cli(*of, **by)) or configs[-1])
        assert call(patch, preview_views, data, out, "--samples", "3", *words) == 0
    axes = figures[0].axes
    return configs[-1], [cell.get_title() for cell in axes if cell.get_title()], [cell.get_xlabel() for cell in axes]


def test_all_groups_are_shown_with_their_parameters(
    photo_dataset_path: Path, photo_dataset: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--image-size", "16", "--more-views", "count=2 image-size=8 blur-prob=1", "--seed", "3"]
    config, titles, texts = shown(
        monkeypatch, photo_dataset_path, tmp_path / "x.png", *words, "--backend", "torchvision"
    )
    assert titles == ["original", "view 1, 16 px", "view 2, 16 px", "view 3, 8 px", "view 4, 8 px"]
    rows = [texts[row * 5 : row * 5 + 5] for row in range(3)]
    ids = np.array([int(row[0].removeprefix("sample ")) for row in rows])
    np.testing.assert_array_equal(ids, batch_ids(photo_dataset.num_samples, 3, 0, 0, 3))
    params = draw_views(config.views, 3, 0, ids, photo_dataset.sizes(ids))
    for sample, row in enumerate(rows):
        for view, text in enumerate(row[1:]):
            top, left, height, width = params.crop[sample, view]
            assert text.startswith(f"{width}x{height}+{left}+{top}")
            for name, drawn in (("flip", params.flip), ("gray", params.gray)):
                assert (name in text) == drawn[sample, view]
            assert (f"blur {params.sigma[sample, view]:.1f}" in text) == (params.sigma[sample, view] > 0)
            first = "bcsh"[params.order[sample, view, 0]]
            assert (f"\n{first}{params.factors[sample, view].tolist()['bcsh'.index(first)]:.2f} " in text) == bool(
                params.jitter[sample, view]
            )


def test_comparing_shows_both_back_ends_and_their_difference(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nvidia.dali")
    _, titles, _ = shown(monkeypatch, photo_dataset_path, tmp_path / "x.png", "--image-size", "16", "--compare")
    assert titles[1:4] == ["view 1, 16 px\ndali", "view 1, 16 px\ntorchvision", "view 1, 16 px\n|difference| x 16"]
    assert len(titles) == 7


def test_the_recipe_is_that_of_a_run_or_of_a_name_and_flags_override_it(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plain = tmp_path / "x.png", ["--backend", "torchvision"]
    named, _, _ = shown(monkeypatch, photo_dataset_path, out, "--recipe", "cifar10-800ep", "--hue", "0.3", *plain)
    assert named.views == replace(RECIPES["cifar10-800ep"].views, hue=0.3)
    views = ViewRecipe(
        image_size=24,
        crop_scale=(0.5, 0.9),
        more_views=(ViewGroup(count=1, image_size=12, crop_scale=(0.1, 0.2)),),
        extra=Augmentations(erasing=Erasing(prob=0.5, area=(0.1, 0.2))),
    )
    run = PretrainConfig(data=photo_dataset_path, run_dir=tmp_path / "run", seed=11, views=views)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(run.as_json()))
    of_run, titles, _ = shown(monkeypatch, photo_dataset_path, out, "--run-dir", str(tmp_path / "run"), *plain)
    assert (of_run.views, of_run.seed) == (views, 11)
    assert titles == ["original", "view 1, 24 px", "view 2, 24 px", "view 3, 12 px"]
    older = run.as_json()
    for name in ("more_views", "extra", "count", "interpolation"):  # of a version without groups
        del older["views"][name]
    (tmp_path / "run" / "config.json").write_text(json.dumps(older))
    of_older, _, _ = shown(monkeypatch, photo_dataset_path, out, "--run-dir", str(tmp_path / "run"), *plain)
    assert of_older.views == ViewRecipe(image_size=24, crop_scale=(0.5, 0.9))


@pytest.mark.parametrize(
    "text", [None, "{", "[]", "{}", '{"views": 3, "seed": 0}', '{"views": {"size": 3}, "seed": 0}']
)
def test_a_folder_that_is_no_run_is_refused(
    text: str | None, photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    words = [photo_dataset_path, tmp_path / "x.png", "--run-dir", tmp_path]
    assert call(monkeypatch, preview_views, *words) == 2
    error = capsys.readouterr().err
    assert f"--run-dir {tmp_path}: {tmp_path / 'config.json'} " in error
    assert "Traceback" not in error


MISTAKES = {
    ("x.png", "--samples", "0"): "--samples 0: ",
    ("x.png", "--samples", "49"): "has 48; choose 1 up to that",
    ("x.png", "--seed", "-1"): "--seed -1: it must lie in 0 .. 2**64 - 1",
    ("x.png", "--epoch", "-1"): "--epoch -1: epochs are numbered 0 .. ",
    ("x.png", "--epoch", "5000000000"): "--epoch 5000000000: epochs are numbered 0 .. ",
    ("x.jpg",): "x.jpg: the image is written as PNG",
    ("x.png", "--run-dir", "run", "--recipe", "demo"): "--run-dir",
    ("x.png", "--compare", "--backend", "dali"): "--compare with --backend dali: it shows both back ends",
    ("x.png", "--recipe"): "--recipe",
    ("x.png", "--recipe", "imagenet"): "imagenet",
}


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_mistakes(
    arguments: tuple[str, ...], photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out, *more = arguments
    assert call(monkeypatch, preview_views, photo_dataset_path, tmp_path / out, *more) == 2
    assert MISTAKES[arguments] in capsys.readouterr().err
    assert not (tmp_path / out).exists()
