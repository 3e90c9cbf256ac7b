"""Recipes are the paper's to the number, are shown by --help, and give way to flags."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from model.methods.simsiam import SimSiamConfig
from pipeline.common.errors import UserError
from train.config.method_recipes import METHOD_RECIPES
from train.config.recipes import RECIPES, parse_config
from train.config.run_config import PretrainConfig, RecipeName
from train.config.run_plan import make_plan
from train.optimization.optimizer import lr_at

WHERE = ["--data", "images", "--run-dir", "run"]


def test_every_recipe_can_be_built() -> None:
    assert set(RECIPES) == set(get_args(RecipeName))
    for name in RECIPES:
        config = parse_config([*WHERE, "--recipe", name])
        assert config.recipe == name
        assert (config.data, config.run_dir) == (Path("images"), Path("run"))
        assert make_plan(config, num_samples=50_000, world_size=8).total_steps > 0


@pytest.mark.parametrize(("method", "name"), [(m, name) for m, named in METHOD_RECIPES.items() for name in named])
def test_every_methods_recipe_can_be_built(method: str, name: str) -> None:
    config = parse_config([*WHERE, "--method", method, "--recipe", name])
    assert (config.method, config.recipe, config.model.name) == (method, name, method)
    assert config == replace(METHOD_RECIPES[method][name], data=config.data, run_dir=config.run_dir)
    assert make_plan(config, num_samples=50_000, world_size=8 if "imagenet" in name else 1).total_steps > 0


def test_the_runs_of_table_4_are_their_papers() -> None:
    def plan(method: str, epochs: int) -> tuple[float, int, int]:
        config = parse_config([*WHERE, "--method", method, "--recipe", f"imagenet-{epochs}ep"])
        schedule = make_plan(config, 1_281_167, world_size=8).schedule
        return round(schedule.peak_lr, 6), config.global_batch, schedule.warmup_steps

    assert plan("simclr", 100) == plan("simclr", 200) == (4.8, 4096, 3120)
    assert plan("moco-v2", 100) == (0.03, 256, 0)
    assert plan("byol", 100) == (7.2, 4096, 3120)
    assert plan("byol", 200) == (4.8, 4096, 3120)
    assert plan("swav", 200) == (4.8, 4096, 3120)
    swav = parse_config([*WHERE, "--method", "swav", "--recipe", "imagenet-100ep"])
    schedule = make_plan(swav, 1_281_167, world_size=8).schedule
    assert lr_at(schedule, 0) == pytest.approx(0.3)
    assert lr_at(schedule, schedule.total_steps) == pytest.approx(0.0048)
    dino = parse_config([*WHERE, "--recipe", "imagenet-multicrop-100ep"])
    assert dino.method == "dino"
    schedule = make_plan(dino, 1_281_167, world_size=8).schedule
    assert (schedule.peak_lr, schedule.weight_decay) == (0.001, (0.04, 0.4))
    assert lr_at(schedule, schedule.total_steps) == pytest.approx(1e-6)
    assert [view.image_size for view in dino.views.per_view] == [224] * 2 + [96] * 8
    assert [view.solarize_prob for view in dino.views.per_view[:3]] == [0.0, 0.2, 0.0]


def test_a_method_without_a_recipe_has_its_own_settings_and_any_length() -> None:
    config = parse_config([*WHERE, "--method", "dino", "--epochs", "2"])
    assert (config.recipe, config.optim.optimizer, config.model.backbone) == (None, "adamw", "vit_small_patch16_224")
    assert parse_config([*WHERE, "--method", "simclr"]).optim.optimizer == "lars"


def test_a_recipe_that_a_method_does_not_have() -> None:
    with pytest.raises(
        UserError, match="--recipe imagenet-multicrop-200ep: --method simclr has imagenet-100ep, imagenet"
    ):
        parse_config([*WHERE, "--method", "simclr", "--recipe", "imagenet-multicrop-200ep"])
    with pytest.raises(UserError, match="--recipe imagenet-multicrop-200ep: --method simsiam has imagenet-100ep"):
        parse_config([*WHERE, "--method", "simsiam", "--recipe", "imagenet-multicrop-200ep"])


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
