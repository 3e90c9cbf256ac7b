"""The parity table on drawn images, and the whole recipe on real ones where a tar of them is named."""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.backends import reference
from pipeline.dataset.dataset import ShardSet
from pipeline.loader.config import LoaderConfig
from pipeline.loader.loader import open_images, open_views
from pipeline.sampling.sampler import BatchSampler, World
from pipeline.sampling.views import ViewRecipe, centre_crops, draw_views
from pipeline.sharding.make_dataset import make_dataset
from pipeline.sharding.options import ShardingOptions

if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
    pytest.skip("needs NVIDIA DALI, which exists for Linux: pip install nvidia-dali-cuda130", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[3]
REAL = os.environ.get("SIAMSTREAM_IMAGENET_SAMPLE", "")
STAGES = [
    "decode",
    "crop and resize",
    "centre crop",
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "grayscale",
    "blur",
]


def parity(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """Run the script in this process, which has all it needs loaded."""
    monkeypatch.setattr(sys, "argv", ["parity.py", *words])
    runpy.run_path(str(ROOT / "benchmarks" / "parity.py"), run_name="__main__")


def test_the_table_of_differences(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table_file = tmp_path / "parity.md"
    parity(monkeypatch, str(photo_dataset_path), "--samples", "22", "--image-size", "32", "--markdown", str(table_file))
    out = capsys.readouterr().out
    assert table_file.read_text() == out
    rows = [line.strip("| %").split(" | ") for line in out.splitlines() if line.startswith("| ")][1:]
    table = {name: tuple(map(float, numbers)) for name, *numbers in rows}
    assert set(STAGES) < set(table)
    for name, (greatest, mean, share) in table.items():
        assert mean <= 0.5, name
        assert share >= 99, name
        assert greatest >= mean, name
    assert table["decode"] == (0, 0, 100)
    assert table["crop and resize"] == table["centre crop"] == (0, 0, 100)
    assert table["whole recipe"][1] > 0  # it does compare two different things


def test_the_papers_transforms_differ_in_colours_and_blur(
    photo_dataset_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parity(monkeypatch, str(photo_dataset_path), "--samples", "22", "--image-size", "32", "--against", "pil")
    rows = [line.strip("| %").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][
        1:
    ]
    table = {name: tuple(map(float, numbers)) for name, *numbers in rows}
    for name in ("decode", "solarize", "flip"):
        assert table[name] == (0, 0, 100)
    for name in ("hue", "whole jitter, random order", "blur", "whole recipe"):
        greatest, mean, share = table[name]
        assert greatest > 1, name
        assert 0 < mean < 3, name
        assert share > 90, name


def test_each_group_of_views_has_its_lines(
    photo_dataset_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = ("count=2 image-size=20 crop-scale=0.05,0.14", "interpolation=bicubic solarize-prob=0.5")
    parity(monkeypatch, str(photo_dataset_path), "--samples", "12", "--image-size", "32", "--more-views", *groups)
    rows = [line.strip("| %").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][
        1:
    ]
    table = {name: tuple(map(float, numbers)) for name, *numbers in rows}
    for group in ("2 x 32 px, bilinear", "2 x 20 px, bilinear", "1 x 32 px, bicubic"):
        assert table[f"crop and resize, {group}"] == (0, 0, 100)
        greatest, mean, share = table[f"whole recipe, {group}"]
        assert 0 < mean <= 0.5
        assert greatest >= mean
        assert share >= 99


def test_mistakes_of_a_user(
    photo_dataset_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words, remedy in ((["--device", "cuda"], "--device cpu"), (["--samples", "0"], "--samples 0")):
        with pytest.raises(SystemExit) as caught:
            parity(monkeypatch, str(photo_dataset_path), *words)
        assert caught.value.code == 2
        assert remedy in capsys.readouterr().err


@pytest.fixture(scope="module")
def real_dataset(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """The first 48 images of the tar."""
    folder = tmp_path_factory.mktemp("real")
    with tarfile.open(REAL) as tar:
        for member in [entry for entry in tar if entry.isfile()][:48]:
            image = tar.extractfile(member)
            assert image is not None
            (folder / Path(member.name).name).write_bytes(image.read())
    out = tmp_path_factory.mktemp("real-dataset") / "dataset"
    make_dataset(str(folder), out, ShardingOptions(workers=1), quiet=True)
    return ShardSet.open(out)


@pytest.mark.skipif(not Path(REAL).is_file(), reason="set SIAMSTREAM_IMAGENET_SAMPLE to a tar of JPEGs")
def test_the_whole_recipe_on_real_images(real_dataset: ShardSet) -> None:
    """Mean difference at most 0.5 of 255 and 99 % of the values within 4, for views of 224 px and for evaluation."""
    recipe, alone = ViewRecipe(), World.alone(torch.device("cpu"))
    std = torch.tensor(recipe.std)[:, None, None]
    apart = []
    with open_views(
        real_dataset, recipe, LoaderConfig(backend="dali"), BatchSampler(0, 16, epochs=1), alone
    ) as batches:
        for views in batches:
            params = draw_views(recipe, 0, 0, views.ids, real_dataset.sizes(views.ids))
            for i, sample in enumerate(views.ids.tolist()):
                image = reference.decode(real_dataset.read(sample))
                for view, x in enumerate(views.views):
                    expected = reference.normalise(reference.transform(image, params, i, view, recipe), recipe)
                    apart.append((x[i] - expected).abs() * std * 255)
    assert len(apart) == 2 * len(real_dataset)
    assert torch.stack(apart).mean() <= 0.5
    assert (torch.stack(apart) <= 4).float().mean() >= 0.99

    ids = np.arange(len(real_dataset))
    crops, centres = centre_crops(recipe.image_size, real_dataset.sizes(ids)), []
    with open_images(real_dataset, recipe, LoaderConfig(backend="dali"), alone, ids=ids, batch=16) as images:
        for x, part in images:
            for made, sample in zip(x, part.tolist(), strict=True):
                centre = reference.centre_crop(reference.decode(real_dataset.read(sample)), crops, sample, 224)
                centres.append((made - reference.normalise(centre, recipe)).abs() * std * 255)
    assert torch.stack(centres).mean() <= 0.5
    assert (torch.stack(centres) <= 4).float().mean() >= 0.99
