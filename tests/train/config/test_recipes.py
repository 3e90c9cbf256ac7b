"""Recipes are the paper's to the number, are shown by --help, and give way to flags."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from model.methods.simsiam import SimSiamConfig
from train.config.recipes import RECIPES, parse_config
from train.config.run_config import PretrainConfig, RecipeName
from train.config.run_plan import make_plan

WHERE = ["--data", "images", "--run-dir", "run"]


def test_every_recipe_can_be_built() -> None:
    assert set(RECIPES) == set(get_args(RecipeName))
    for name in RECIPES:
        config = parse_config([*WHERE, "--recipe", name])
        assert config.recipe == name
        assert (config.data, config.run_dir) == (Path("images"), Path("run"))
        assert make_plan(config, num_samples=50_000, world_size=8).total_steps > 0


def test_imagenet_is_the_paper_and_the_defaults() -> None:
    recipe, defaults = (parse_config([*WHERE, *more]) for more in (["--recipe=imagenet-100ep"], []))
    assert recipe.identity("d") == defaults.identity("d")
    longer = parse_config([*WHERE, "--recipe", "imagenet-200ep"])
    assert (longer.epochs, longer.global_batch) == (200, 256)
    plan = make_plan(longer, 1_281_167, world_size=8)
    assert plan.schedule.peak_lr == pytest.approx(0.05)
    assert plan.schedule.warmup_steps == 0
    assert longer.model == SimSiamConfig()


def test_cifar10_is_appendix_d() -> None:
    config = parse_config([*WHERE, "--recipe", "cifar10-800ep"])
    assert (config.epochs, config.global_batch) == (800, 512)
    assert (config.optim.base_lr, config.optim.weight_decay, config.optim.momentum) == (0.03, 5e-4, 0.9)
    model = config.model
    assert (model.backbone, model.stem, model.projector_layers, model.dim) == ("resnet18", "cifar", 2, 2048)
    assert (config.views.image_size, config.views.blur_prob) == (32, 0.0)
    plan = make_plan(config, 50_000, world_size=1)
    assert plan.steps_per_epoch == 97
    assert plan.schedule.peak_lr == pytest.approx(0.06)  # 0.03 x 512 / 256
    assert plan.schedule.warmup_steps == 0


def test_a_flag_overrides_a_recipe_and_nothing_else_moves() -> None:
    recipe = parse_config([*WHERE, "--recipe", "cifar10-800ep"])
    changed = parse_config([*WHERE, "--blur-prob", "0.5", "--recipe", "cifar10-800ep", "--epochs", "200"])
    differing = {key for key, value in changed.identity("d").items() if recipe.identity("d")[key] != value}
    assert differing == {"epochs", "views.blur_prob"}


def shown(arguments: list[str], capsys: Any) -> str:
    with pytest.raises(SystemExit) as end:
        parse_config(arguments)
    text = capsys.readouterr()
    return f"{end.value.code} " + " ".join((text.out + text.err).replace("│", " ").split())


def test_help_shows_the_values_of_a_recipe(capsys: Any) -> None:
    text = shown(["--recipe", "cifar10-800ep", "--help"], capsys)
    assert "appendix D takes 2 for CIFAR-10. (default: 2)" in text
    assert "section 3]. (default: 0.03)" in text
    assert "--data DIR|URL Dataset folder" in text
    plain = shown(["--help"], capsys)
    assert "section 3]. (default: 0.05)" in plain


def test_an_unknown_recipe_is_told_with_the_known_ones(capsys: Any) -> None:
    text = shown([*WHERE, "--recipe", "imagenet"], capsys)
    assert text.startswith("2 ")
    assert "cifar10-800ep" in text


def test_a_recipe_is_recorded() -> None:
    config: PretrainConfig = parse_config([*WHERE, "--recipe", "demo"])
    assert config.as_json()["recipe"] == "demo"
