"""Sweeps over the paper's tables on a small dataset: the flags, the budget, stopped and gone on with, and the page."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import train.openmp  # noqa: F401
from model.methods.registry import METHODS
from model.methods.simsiam import SimSiamConfig
from pipeline.common.errors import UserError
from pipeline.dataset.dataset import ShardSet
from pipeline.loader.loader import ViewBatch
from tests.helpers import toy_runs
from tests.train.test_pretrain import alone
from tools import reproduce
from tools.reproduction import sweep as sweep_module
from tools.reproduction.method_flags import method_flags
from tools.reproduction.paper_tables import METHODS_TABLE, TABLES
from tools.reproduction.report import compare, difference_of, floor_of, mean_of
from tools.reproduction.scale import RECIPES, Recipe, choose_recipe, fitting
from tools.reproduction.sweep import PILOT_FILE, Sweep
from train import linear, pretrain
from train.config.recipes import parse_config
from train.config.run_plan import make_plan
from train.engine import loop as loop_module
from train.engine.build import prepare
from train.engine.run import write_run_files

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = Recipe(
    "resnet_tiny at 16 px",
    (
        *("--backbone", "resnet_tiny", "--image-size", "16", "--dim", "16", "--projector-hidden", "16"),
        *("--backend", "torchvision", "--threads", "1"),
    ),
    batch=12,
    linear=("--features-cache", "--epochs", "2", "--global-batch", "12", "--backend", "torchvision", "--threads", "1"),
    most_epochs=2,
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "cpu", TINY)


Launched = list[tuple[str, Path, list[str]]]  # script, run folder, arguments


@pytest.fixture
def launched(tiny: None, monkeypatch: pytest.MonkeyPatch) -> Launched:
    """The scripts run in this process, as importing torch anew for each takes seconds."""
    calls: Launched = []

    def launch(_: Sweep, command: str, arguments: list[str]) -> None:
        script = Path(command.split()[1])
        calls.append((script.stem, Path(arguments[arguments.index("--run-dir") + 1]), arguments))
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [script.name, *arguments])
            {"pretrain": pretrain, "linear": linear}[script.stem].main()

    monkeypatch.setattr(Sweep, "_launch", launch)
    return calls


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    before = signal.getsignal(signal.SIGTERM)
    try:
        return toy_runs.call(monkeypatch, reproduce, *arguments)
    finally:
        signal.signal(signal.SIGTERM, before)


def flags(data: Path, out: Path, table: str = "stop-gradient", budget: str = "1000") -> list[str]:
    places = ["--data", str(data), "--val-data", str(data), "--out", str(out), "--device", "cpu"]
    return [table, *places, "--budget", budget]


def test_the_papers_numbers() -> None:
    expected = {
        "stop-gradient": [67.7, 0.1],
        "predictor": [67.7, 0.1, 1.5, 68.1],
        "batch-size": [68.1, 66.1, 67.3, 68.1, 68.0, 67.9, 64.0],
        "bn": [68.1, 34.6, 67.4, None],
        "similarity": [68.1, 63.2],
        "symmetrisation": [68.1, 64.8, 67.3],
        "alternation": [68.1, 68.7, 68.9, 67.0],
        "moving-average": [68.1, 0.1, 55.0],
        "output-dimension": [68.1, 67.5, 67.2, 65.3],
    }
    assert {name: [variant.paper_top1 for variant in table.variants] for name, table in TABLES.items()} == expected


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("table", TABLES)
def test_every_variant_is_a_run_of_its_own(table: str, recipe: str, tmp_path: Path) -> None:
    places = ["--data", str(tmp_path), "--run-dir", str(tmp_path)]
    configs = []
    for variant in TABLES[table].variants:
        batch = ["--global-batch", str(variant.batch or RECIPES[recipe].batch)]
        config = parse_config([*places, *RECIPES[recipe].pretrain, *batch, *variant.flags])
        configs.append(config)
    assert len({json.dumps(config.identity("x")) for config in configs}) == len(configs)
    names = [variant.name for variant in TABLES[table].variants]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_method_is_a_run_with_its_own_recipe(recipe: str, tmp_path: Path) -> None:
    places = ["--data", str(tmp_path), "--run-dir", str(tmp_path), "--global-batch", str(RECIPES[recipe].batch)]
    configs = []
    for variant in METHODS_TABLE.variants:
        assert variant.method is not None
        shared = method_flags(variant.method, recipe, epochs=20)
        config = parse_config([*places, "--epochs", "20", *shared, *variant.flags])
        assert config.method == variant.method
        make_plan(config, num_samples=50_000, world_size=1)  # the method takes such batches and views
        configs.append(config)
    assert len({json.dumps(config.identity("x")) for config in configs}) == len(configs)
    assert len({(config.model.backbone, config.views.image_size) for config in configs}) == 1
    assert {config.method for config in configs} == set(METHODS)


def test_the_papers_comparison_of_methods() -> None:
    """Table 4 at 100 epochs; SimCLR and SwAV with SimSiam's parts in sections 6.2 and 6.3."""
    numbers = {variant.name: variant.paper_top1 for variant in METHODS_TABLE.variants}
    assert numbers == {
        "simsiam": 68.1, "simclr": 66.5, "moco-v2": 67.4, "byol": 66.5, "swav": 66.5, "dino": None,
        "simclr-predictor": 66.4, "simclr-stop-gradient": 66.0, "swav-predictor": 65.2, "swav-no-stop-gradient": None,
        "byol-no-momentum": None,
    }  # fmt: skip
    flags = {variant.name: variant.flags for variant in METHODS_TABLE.variants}
    assert flags["simclr-stop-gradient"] == ("--predictor", "--stop-gradient")
    assert flags["byol-no-momentum"] == ("--no-momentum-encoder", "--predictor-lr-scale", "10")


@pytest.mark.parametrize("table", [name for name in TABLES if name != "batch-size"])
def test_every_variant_trains_a_step_of_its_own(table: str, photo_dataset_path: Path, tmp_path: Path) -> None:
    """Same images, same seed; what differs is the flags of the variant, and so the step or the loss."""
    places = ["--data", str(photo_dataset_path), "--run-dir", str(tmp_path / "run"), "--device", "cpu"]
    torch.manual_seed(0)
    x1, x2 = torch.randn(2, 12, 3, 16, 16)
    seen = ViewBatch([x1, x2], np.arange(12), np.arange(12), epoch=0, step=0, wait_s=0.0)
    other = replace(seen, views=[x2.flip(0), x1.flip(0)], pair=1)
    ends = []
    for variant in TABLES[table].variants:
        run = prepare(parse_config([*places, "--global-batch", "12", *TINY.pretrain, *variant.flags]), alone())
        write_run_files(run)
        run.model.train()
        losses = []
        for run.step in (0, 4, 10, 100):  # there targets are renewed, and the predictor's rate has decayed
            losses += [loop_module.train_step(run, iter([seen, other])).loss.item() for _ in range(2)]
        assert all(map(math.isfinite, losses))
        ends.append(tuple(losses))
    assert len(set(ends)) == len(ends)


def test_the_switches_say_what_the_tables_mean() -> None:
    def model(table: str, name: str) -> SimSiamConfig:
        (variant,) = [variant for variant in TABLES[table].variants if variant.name == name]
        return parse_config(["--data", "x", "--run-dir", "x", *variant.flags]).model

    paper = SimSiamConfig()
    assert model("stop-gradient", "without") == replace(paper, stop_gradient=False, predictor_lr="cosine")
    assert model("predictor", "fixed-random") == replace(paper, predictor="fixed-random", predictor_lr="cosine")
    assert model("bn", "none") == replace(paper, projector_bn="none", predictor_bn="none")
    assert model("symmetrisation", "asymmetric-2x") == replace(paper, symmetric=False, pairs=2)
    assert model("alternation", "1-epoch") == replace(paper, targets="frozen", target_steps="epoch")
    assert model("moving-average", "average") == replace(paper, predictor="none", targets="moving-average")
    assert model("output-dimension", "dim-256").predictor_width == 64


def test_a_sweep_makes_a_page_and_a_plot(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launched: Launched, capsys: Any
) -> None:
    arguments = [*flags(photo_dataset_path, tmp_path / "out"), "--docs", str(tmp_path / "docs")]
    assert call(monkeypatch, *arguments) == 0
    assert [(script, run_dir.name) for script, run_dir, _ in launched[2:]] == [
        ("pretrain", "with"), ("linear", "linear"), ("pretrain", "without"), ("linear", "linear")
    ]  # fmt: skip
    page = (tmp_path / "docs" / "stop-gradient.md").read_text()
    linear_top1 = json.loads((tmp_path / "out" / "with" / "linear" / "summary.json").read_text())["val_top1"]
    knn_top1 = json.loads((tmp_path / "out" / "with" / "summary.json").read_text())["knn_top1"]
    assert f"| with stop-gradient | 67.7 | {linear_top1:.1f} | {knn_top1:.1f} | " in page
    assert "| without stop-gradient | 0.1 | " in page
    assert "Here: resnet_tiny at 16 px, 48 images, 2 epochs of 4 steps, batch 12, one seed" in page
    assert "The paper: ResNet-50 at 224 px on ImageNet" in page
    assert f"no nearer than 2/sqrt(batch), here {2 / math.sqrt(12):.2f} (" in page
    assert "- without stop-gradient: -67.6 in the paper; here linear " in page
    assert "![With and without stop-gradient](stop-gradient.png)" in page
    assert (tmp_path / "docs" / "stop-gradient.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "docs" / "stop-gradient.md") in capsys.readouterr().out
    # Once more: nothing is left to do, and the page is the same.
    before = len(launched)
    assert call(monkeypatch, *arguments) == 0
    assert len(launched) == before
    assert (tmp_path / "docs" / "stop-gradient.md").read_text() == page


def test_a_stopped_sweep_goes_on_where_it_was(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launched: Launched, capsys: Any
) -> None:
    arguments = flags(photo_dataset_path, tmp_path / "out")
    launch = Sweep._launch

    def stop_in_the_last_run(sweep: Sweep, command: str, more: list[str]) -> None:
        last = tmp_path / "out" / "without"
        if command.endswith("pretrain.py") and str(last) in more:
            launch(sweep, command, [*more, "--max-steps", "3"])  # as after a signal: a checkpoint, and not finished
            raise KeyboardInterrupt
        launch(sweep, command, more)

    with monkeypatch.context() as patch:
        patch.setattr(Sweep, "_launch", stop_in_the_last_run)
        assert call(patch, *arguments) == 75
    assert "the same command goes on from here" in capsys.readouterr().err
    before = len(launched)
    assert call(monkeypatch, *arguments) == 0
    assert [(script, run_dir.name) for script, run_dir, _ in launched[before:]] == [
        ("pretrain", "without"), ("linear", "linear")
    ]  # fmt: skip
    out = capsys.readouterr().out
    assert "going on with the sweep" in out
    assert "--resume: going on after step 3 of 8" in out
    assert "without stop-gradient" in (tmp_path / "out" / "stop-gradient.md").read_text()


def plant_pilot(out: Path, step_s: float) -> None:
    out.mkdir(parents=True)
    (out / PILOT_FILE).write_text(json.dumps({"step_s": step_s, "start_s": 10.0, "knn_s": 5.0, "linear_s": 20.0}))


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("table", ["stop-gradient", "alternation"])
def test_too_small_a_budget_says_the_minimum_and_the_minimum_is_enough(
    table: str, photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(RECIPES, "cpu", replace(TINY, most_epochs=50))
    plant_pilot(tmp_path / "out", step_s=6.0)
    assert call(monkeypatch, *flags(photo_dataset_path, tmp_path / "out", table, "0.5")) == 2
    error = capsys.readouterr().err
    assert "--budget 0.5 minutes is too little" in error
    least = int(error.split("images need ")[1].split(" minutes")[0])
    ran: list[str] = []
    monkeypatch.setattr(Sweep, "run", lambda _, variant, scale: ran.append(f"{variant.name} {scale.epochs}"))
    monkeypatch.setattr(reproduce, "write_report", lambda *_, **__: tmp_path / "page.md")
    assert call(monkeypatch, *flags(photo_dataset_path, tmp_path / "out", table, str(least))) == 0
    epochs = int(ran[0].split()[1])
    assert epochs >= TABLES[table].least_epochs
    assert ran == [f"{variant.name} {epochs}" for variant in TABLES[table].variants]
    assert math.isclose(epochs, TABLES[table].least_epochs, abs_tol=2)  # no more than the budget has room for


@pytest.mark.usefixtures("tiny")
def test_another_budget_is_another_sweep(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(Sweep, "run", lambda *_: None)
    monkeypatch.setattr(reproduce, "write_report", lambda *_, **__: tmp_path / "page.md")
    plant_pilot(tmp_path / "out", step_s=0.1)
    assert call(monkeypatch, *flags(photo_dataset_path, tmp_path / "out", budget="100")) == 0
    assert call(monkeypatch, *flags(photo_dataset_path, tmp_path / "out", "predictor", "90")) == 2
    error = capsys.readouterr().err
    assert "table: there stop-gradient, now predictor; budget: there 100.0, now 90.0" in error


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"table": "stop"}, "table stop is unknown; known are\n  stop-gradient     With and without stop-gradient"),
        ({"budget": "0"}, "--budget 0: give the minutes"),
        ({"seeds": 0}, "--seeds 0: it must be at least 1"),
        ({"processes": -1}, "--processes -1: it must be at least 1, or 0"),
        ({"data": Path("/nowhere")}, "no dataset at /nowhere"),
    ],
)
def test_mistakes(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, changed: Any, message: str
) -> None:
    own = {"data": photo_dataset_path, "out": tmp_path / "out"}
    more = [f"--{name}={value}" for name, value in changed.items() if name in ("seeds", "processes")]
    places = {name: value for name, value in changed.items() if name not in ("seeds", "processes")}
    assert call(monkeypatch, *flags(**{**own, **places}), *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_recipe_follows_the_machine_and_the_images(photo_dataset: ShardSet) -> None:
    assert choose_recipe("cpu", photo_dataset) == "cpu"
    sides = photo_dataset.sizes(torch.arange(photo_dataset.num_samples).numpy()).min(axis=1)
    small = sorted(sides)[len(sides) // 2] <= 64
    assert choose_recipe("cuda", photo_dataset) == ("gpu-small" if small else "gpu-large")
    batches = [variant.batch for variant in fitting(TABLES["batch-size"], 600)]
    assert batches == [256, 64, 128]  # the others would have less than two steps an epoch


def test_the_floor_is_named_where_it_is_one_for_all_runs() -> None:
    def floor(table: str, world_size: int = 1) -> float | None:
        results = [SimpleNamespace(variant=variant) for variant in TABLES[table].variants]
        return floor_of(results, {"world_size": world_size, "micro_batch": 64})  # type: ignore[arg-type]

    assert floor("stop-gradient") == 0.25
    assert floor("stop-gradient", world_size=2) is None
    assert floor("batch-size") is None


@pytest.mark.parametrize(
    ("paper", "before", "after", "sign"),
    [
        # One seed, 2000 images at 50 %: 1.58 points of the images and 2 x 1.1^2 of the runs are 2.22, twice is 4.4
        (-67.6, (50.0,), (45.0,), "same sign"),
        (-67.6, (50.0,), (55.0,), "opposite sign"),
        (-67.6, (50.0,), (46.0,), "too close to tell"),
        (+0.4, (30.0,), (35.0,), "same sign"),
        # Three seeds: Student's t with 4 degrees of freedom; a wide spread hides what a narrow one shows
        (-1.0, (50.0, 50.1, 49.9), (44.0, 44.1, 43.9), "same sign"),
        (-1.0, (50.0, 56.0, 44.0), (44.0, 50.0, 38.0), "too close to tell"),
    ],
)
def test_signs(paper: float, before: tuple[float, ...], after: tuple[float, ...], sign: str) -> None:
    assert compare(paper, difference_of(before, after, samples=2000)) == sign


def test_intervals_by_hand() -> None:
    # sd 1, three runs: 4.30 / sqrt(3); one run has no interval
    assert str(mean_of((40.0, 41.0, 42.0))) == "41.0 ± 2.5"
    assert str(mean_of((40.0,))) == "40.0"
    # sqrt((1 + 4) / 3 + 2 x 50 x 50 / 1e9) x 2.78
    assert str(difference_of((50.0, 51.0, 49.0), (50.0, 52.0, 48.0), samples=10**9)) == "0.0 ± 3.6"
    many = difference_of((50.0, 50.0), (50.0, 50.0), samples=5000)  # 1 point of images, 2 degrees of freedom
    assert many.half == pytest.approx(4.30)


def test_the_interval_covers_the_true_difference_as_often_as_it_says() -> None:
    """Simulated: 3 runs of sd 1 each, no difference; 95 % of the intervals contain 0."""
    rng, trials = np.random.default_rng(0), 2000
    runs = rng.normal(50, 1, (trials, 2, 3))
    found = [difference_of(tuple(a), tuple(b), samples=10**9) for a, b in runs]
    covered = np.mean([abs(interval.value) <= interval.half for interval in found])
    assert 0.93 < covered < 0.97


def test_several_seeds_give_means_and_intervals(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launched: Launched
) -> None:
    arguments = [*flags(photo_dataset_path, tmp_path / "out"), "--seeds", "2", "--seed", "7"]
    assert call(monkeypatch, *arguments) == 0
    runs = [
        (run_dir.name, words[words.index("--seed") + 1]) for script, run_dir, words in launched if script != "linear"
    ]
    assert runs[1:] == [("with", "7"), ("with-seed-1", "8"), ("without", "7"), ("without-seed-1", "8")]
    folders = [tmp_path / "out" / name for name, _ in runs[1:3]]
    linear = [json.loads((folder / "linear" / "summary.json").read_text())["val_top1"] for folder in folders]
    page = (tmp_path / "out" / "stop-gradient.md").read_text()
    assert f"| with stop-gradient | 67.7 | {mean_of(linear)} | " in page
    assert "batch 12, 2 seeds; accuracies" in page
    assert "the spread from run to run is that of the 2 seeds" in page
    assert "--device cpu --seeds 2" in page
    assert call(monkeypatch, *flags(photo_dataset_path, tmp_path / "out"), "--seeds", "3") == 2  # another sweep


CHILD = """
import os, pathlib, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
os.kill(os.getppid(), signal.SIGINT)  # Ctrl-C reaches the sweep
if signal.sigtimedwait({signal.SIGTERM}, 60) is None:
    sys.exit(1)
pathlib.Path(sys.argv[1]).write_text("checkpoint")
sys.exit(75)
"""


@pytest.fixture
def sweep(photo_dataset: ShardSet, tmp_path: Path) -> Sweep:
    config = sweep_module.ReproduceConfig("stop-gradient", tmp_path, tmp_path, 1.0)
    return Sweep(config, tmp_path, photo_dataset, "cpu", processes=1)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_stop_waits_until_the_run_has_saved_itself(sweep: Sweep, tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text(CHILD)
    with pytest.raises(KeyboardInterrupt):
        sweep._launch(f"python {tmp_path / 'child.py'}", [str(tmp_path / "saved")])
    assert (tmp_path / "saved").read_text() == "checkpoint"


@pytest.mark.parametrize(("code", "end"), [(2, SystemExit), (1, SystemExit), (75, KeyboardInterrupt)])
def test_a_run_that_fails_ends_the_sweep(sweep: Sweep, tmp_path: Path, code: int, end: type[BaseException]) -> None:
    (tmp_path / "child.py").write_text(f"import sys; sys.exit({code})")
    with pytest.raises(end) as raised:
        sweep._launch(f"python {tmp_path / 'child.py'}", [])
    if end is SystemExit:
        assert raised.value.code == code


def test_a_damaged_file_is_named(sweep: Sweep, tmp_path: Path) -> None:
    (tmp_path / PILOT_FILE).write_text("{")
    with pytest.raises(UserError, match=r"pilot\.json cannot be read .* delete it"):
        sweep._pilot()
