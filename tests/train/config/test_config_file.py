"""A configuration comes back from JSON as it was, and what is no setting is refused by its name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.common.errors import UserError
from pipeline.common.locations import Url
from pipeline.sampling.augmentations import Augmentations, Erasing
from pipeline.sampling.views import ViewGroup
from train.config.config_file import check_urls_are_whole, config_from, read_settings
from train.config.method_recipes import METHOD_RECIPES
from train.config.recipes import RECIPES
from train.config.run_config import PretrainConfig

EMPTY = PretrainConfig(data=Path("/none"), run_dir=Path("/none"))
EVERY_RECIPE = {
    **{f"simsiam {name}": recipe for name, recipe in RECIPES.items()},
    **{f"{method} {name}": recipe for method, named in METHOD_RECIPES.items() for name, recipe in named.items()},
}


def read_config(path: Path, base: PretrainConfig) -> PretrainConfig:
    return config_from(read_settings(path), base, str(path))


def written(folder: Path, values: Any) -> Path:
    path = folder / "config.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", EVERY_RECIPE)
def test_every_recipe_comes_back(name: str, tmp_path: Path) -> None:
    config = replace(EVERY_RECIPE[name], data=tmp_path / "data", run_dir=tmp_path / "run")
    assert read_config(written(tmp_path, config.as_json()), EMPTY) == config


def test_all_kinds_of_values_come_back(tmp_path: Path) -> None:
    views = replace(
        EMPTY.views,
        more_views=(ViewGroup(count=6, image_size=96, crop_scale=(0.05, 0.14)), ViewGroup(interpolation="bicubic")),
        extra=Augmentations(erasing=Erasing(prob=0.5, area=(0.1, 0.2))),
    )
    config = replace(
        EMPTY,
        data=Url("s3://bucket/folder"),
        init=tmp_path / "weights.pt",
        max_steps=7,
        views=views,
        model=replace(EMPTY.model, targets="frozen", target_steps="epoch"),
        knn=replace(EMPTY.knn, data=tmp_path / "labelled"),
    )
    assert read_config(written(tmp_path, config.as_json()), EMPTY) == config


def test_what_a_file_does_not_name_is_as_in_the_base(tmp_path: Path) -> None:
    path = written(tmp_path, {"epochs": 20, "optim": {"base_lr": 1}, "session": {"host": "x"}, "loader_tuning": None})
    base = replace(RECIPES["demo"], data=tmp_path, run_dir=tmp_path)
    assert read_config(path, base) == replace(base, epochs=20, optim=replace(base.optim, base_lr=1.0))
    other = read_config(written(tmp_path, {"method": "byol"}), base)
    assert (other.model.name, other.views, other.epochs) == ("byol", other.model.default_views(), base.epochs)


def test_paths_are_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = replace(EMPTY, data=Path("data"), init=Path("w.pt")).as_json()
    assert (values["data"], values["init"]) == (str(tmp_path / "data"), str(tmp_path / "w.pt"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("{", "is no JSON"),
        ("[1]", "holds no object with settings"),
        ({"epoch": 3}, "has epoch, which is no setting of a run: did you mean epochs?"),
        ({"views": {"hues": 0.1}}, "has views.hues, which is no setting of a run: did you mean hue?"),
        ({"epochs": "3"}, 'has epochs "3", which is no whole number'),
        ({"epochs": True}, "has epochs true, which is no whole number"),
        ({"epochs": 0}, "--epochs 0: it must be at least 1"),
        ({"model": {"projector_layers": 1_000_000}}, "--projector-layers 1000000: it must be at most 100"),
        ({"sync_bn": 1}, "has sync_bn 1, which is no true or false"),
        ({"optim": 3}, "has optim 3, which has settings of its own"),
        ({"optim": {"base_lr": "high"}}, 'has optim.base_lr "high", which is no number'),
        ({"on_collapse": "ask"}, 'has on_collapse "ask", which is no "warn" or "stop"'),
        ({"views": {"crop_scale": [0.1]}}, "has views.crop_scale [0.1], which is no list of 2 numbers"),
        ({"views": {"more_views": [{"size": 3}]}}, "has views.more_views[0].size, which is no setting"),
        ({"init": 3}, "has init 3, which is no path or null"),
        ({"max_steps": 1.5}, "has max_steps 1.5, which is no whole number or null"),
        ({"method": "simsim"}, "--method simsim is unknown; known are"),
        ({"model": {"queue": 3}}, "has model.queue, which is no setting of a run"),
    ],
)
def test_mistakes(values: Any, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, values)
    with pytest.raises(UserError) as error:
        read_config(path, EMPTY)
    assert message in str(error.value)
    assert str(path) in str(error.value) or str(error.value).startswith("--")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_config(tmp_path / "none.json", EMPTY)


def test_a_url_whose_secret_is_not_recorded(tmp_path: Path) -> None:
    secret = "name:" + "word"
    config = replace(EMPTY, data=Url(f"https://{secret}@host/folder"))
    path = written(tmp_path, config.as_json())
    assert secret not in path.read_text()
    with pytest.raises(UserError, match="give --data again"):
        check_urls_are_whole(read_config(path, EMPTY), path)
    check_urls_are_whole(config, path)
