"""The recipes of --recipe NAME: whole configurations, each number with its source. Any flag overrides a value.

``train/pretrain.py --recipe NAME --help`` shows a recipe's values as the defaults. What a recipe does not name is as in
the configuration's own defaults, which are the paper's for ImageNet (Chen & He 2020, arXiv:2011.10566). With --method
METHOD it is that method's recipe of the name (method_recipes.py).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from model.methods.base import MethodConfig
from model.methods.registry import DEFAULT_METHOD, METHODS, method_config
from model.methods.simsiam import SimSiamConfig
from pipeline.common.errors import UserError
from pipeline.common.flags import usage
from pipeline.common.locations import local_path
from pipeline.common.mixed_data import gather
from train.config.config_file import SESSION, check_urls_are_whole, config_from, read_settings, yaml_text
from train.config.method_recipes import CIFAR, METHOD_RECIPES, TINY, cifar, demo, recipe
from train.config.resumed import resumed_config
from train.config.run_config import PretrainConfig, RecipeName
from train.optimization.optimizer import OptimConfig

UNNAMED = Path("(not given)")  # --data and --run-dir of --print-config


def parse_config(arguments: list[str] | None = None, prints: bool = True) -> PretrainConfig:
    """Read the command line; a recipe takes the place of defaults, --config comes over it, and flags over both.

    With --resume the defaults are the run's own configuration. Unknown flags end the process with code 2; ``prints``:
    with a message. Raises UserError for values that cannot be, and for flags that disagree with the run to be resumed.
    """
    words = gather(sys.argv[1:] if arguments is None else arguments)
    file = _config_file(words)

    def parse(default: PretrainConfig) -> PretrainConfig:
        if file is not None:
            default = config_from(file.values, default, str(file.path))
            check_urls_are_whole(default, file.path)
        return _parse(words, default, prints)

    named = [*(file.words if file is not None else ()), *words]
    resumed = resumed_config(named, parse)
    return parse(defaults(named)) if resumed is None else resumed


class _ConfigFile(NamedTuple):
    """The file of --config."""

    path: Path
    values: dict[str, Any]

    @property
    def words(self) -> list[str]:
        """What of it is needed before the parser: as flags."""
        flags = {"method": "--method", "recipe": "--recipe", "run_dir": "--run-dir", "data": "--data"}
        texts = [(flag, self.values.get(name)) for name, flag in flags.items()]
        named = [word for flag, text in texts if isinstance(text, str) for word in (flag, text)]
        if isinstance(self.values.get("data"), list):
            named += ["--data", *map(str, self.values["data"])]
        return [*named, *(["--resume"] if self.values.get("resume") is True else [])]


def _config_file(words: list[str]) -> _ConfigFile | None:
    """The file of --config, if there is one. Raises UserError where it and a flag name two methods or recipes."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--config", "--method", "--recipe"):
        parser.add_argument(flag, nargs="?")
    given = parser.parse_known_args(words)[0]
    if given.config is None:
        return None
    path = local_path(given.config)
    values = read_settings(path, f"--config {path}")
    if SESSION in values:  # a run's own: it may have been resumed
        values["resume"] = False
    for name in ("method", "recipe"):
        flag, own = getattr(given, name), values.get(name)
        if flag is not None and own is not None and flag != own:
            raise UserError(f"--{name} {flag}, but {path} has {name} {own}, and settings that go with it: name one")
    return _ConfigFile(path, values)


def _parse(words: list[str], default: PretrainConfig, prints: bool) -> PretrainConfig:
    """The command line over ``default``."""
    _check_flags(words, default.model)
    if "--print-config" in words or "--print_config" in words:
        default = replace(
            default,
            data=UNNAMED if default.data is tyro.MISSING else default.data,
            run_dir=UNNAMED if default.run_dir is tyro.MISSING else default.run_dir,
        )
    return tyro.cli(
        PretrainConfig, args=words, prog=usage("--data DIR --run-dir DIR"), default=default, console_outputs=prints
    )


def printed(config: PretrainConfig) -> str:
    """The settings as YAML for --config, without --data and --run-dir where they were not given."""
    values = config.as_json()
    for name in ("data", "run_dir"):
        if getattr(config, name) == UNNAMED:
            del values[name]
    return yaml_text(values)


def defaults(words: list[str]) -> PretrainConfig:
    """The configuration that a command line's --recipe and --method name, before its other flags.

    A method without a recipe has the settings of its run of 100 epochs. Raises UserError for an unknown method, or one
    that has no such recipe. The parser reports an unknown recipe.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", nargs="?")
    parser.add_argument("--method", nargs="?")
    named = parser.parse_known_args(words)[0]
    if named.recipe in RECIPES:
        return recipe_of(named.recipe, named.method)
    reference = recipe_of("imagenet-100ep", named.method or DEFAULT_METHOD)
    # Warm-up by the rule for any length of the run.
    return replace(reference, recipe=None, optim=replace(reference.optim, warmup_epochs=None))


def recipe_of(name: RecipeName, method: str | None = None) -> PretrainConfig:
    """The recipe of a method; None: of the method that the name belongs to, SimSiam for most.

    Raises UserError for a method that has no such recipe.
    """
    if method is None:
        return RECIPES[name]
    of_method = METHOD_RECIPES.get(method_config(method).name, {})
    if method == DEFAULT_METHOD:
        of_method = {known: recipe for known, recipe in RECIPES.items() if recipe.method == method}
    if name not in of_method:
        raise UserError(f"--recipe {name}: --method {method} has {', '.join(of_method)}")
    return of_method[name]


def _check_flags(words: list[str], model: MethodConfig) -> None:
    flags = {word.partition("=")[0].removeprefix("--").removeprefix("no-") for word in words if word.startswith("--")}
    own = {field.name for field in fields(model)}
    for flag in sorted(flags):
        name = flag.replace("-", "_")
        owners = [other for other, config in METHODS.items() if name in {field.name for field in fields(config)}]
        if owners and name not in own:
            listed = " and ".join(filter(None, (", ".join(owners[:-1]), owners[-1])))
            raise UserError(f"--{flag} is a flag of --method {listed}, not of {model.name}: leave it out")


def config_of(**flags: Any) -> PretrainConfig:
    """The configuration that the command line makes of the same flags. Raises UserError for what it would refuse."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            return parse_config([word for name, value in flags.items() for word in _words(name, value)])
    except SystemExit:
        raise UserError(f"these are no settings of a run:\n{printed.getvalue()}") from None


def _words(name: str, value: Any) -> list[str]:
    group, dot, last = name.replace("_", "-").rpartition(".")
    match value:
        case True:
            return [f"--{group}{dot}{last}"]
        case False:
            return [f"--{group}{dot}no-{last}"]
        case list() | tuple():
            return [f"--{group}{dot}{last}", *map(str, value)]
        case _:
            return [f"--{group}{dot}{last}", str(value)]


RECIPES: dict[RecipeName, PretrainConfig] = {
    # Section 3, "Baseline settings": 68.1 % linear top-1 after 100 epochs.
    "imagenet-100ep": recipe("imagenet-100ep", 100, 512, SimSiamConfig(), OptimConfig(base_lr=0.05, weight_decay=1e-4)),
    # Table 4: 70.0 % after 200 epochs, at batch 256.
    "imagenet-200ep": recipe("imagenet-200ep", 200, 256, SimSiamConfig(), OptimConfig(base_lr=0.05, weight_decay=1e-4)),
    # Appendix D: 91.8 % linear top-1. What it does not give (crop scale, colours, predictor) is as for ImageNet.
    "cifar10-800ep": cifar(SimSiamConfig(**CIFAR, projector_layers=2), OptimConfig(base_lr=0.03, weight_decay=5e-4)),
    # Ours: 600 steps on 6144 images of 32 px, some minutes on 2 CPU cores. They leave no time to learn slowly, as the
    # paper's 500,000 do with 0.05, and in trials accuracy grew with the rate; heads a quarter as wide; the rest as for
    # CIFAR-10.
    "demo": demo(
        SimSiamConfig(**TINY, projector_layers=2, dim=512, predictor_hidden=128),
        OptimConfig(base_lr=1.0, weight_decay=5e-4),
    ),
    "imagenet-multicrop-100ep": METHOD_RECIPES["dino"]["imagenet-multicrop-100ep"],
    "imagenet-multicrop-200ep": METHOD_RECIPES["swav"]["imagenet-multicrop-200ep"],
}
