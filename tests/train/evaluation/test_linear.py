"""Linear evaluation: LARS against its formula, independent classifiers, every validation image counted once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pipeline.common.errors import UserError
from pipeline.dataset.dataset import ShardSet
from pipeline.loader.config import LoaderConfig
from pipeline.sharding.make_dataset import make_dataset
from pipeline.sharding.options import ShardingOptions
from tests.helpers.both_evaluations import evaluate_both, numbers
from tests.helpers.toy_runs import call
from train import linear
from train.distributed.process_group import DistContext
from train.evaluation.features import EncoderConfig, check_same_classes, open_frozen
from train.evaluation.linear_probe import (
    LinearHeads,
    ProbeConfig,
    build_lars,
    count_correct,
    head_losses,
    set_rates,
    stratified,
)
from train.evaluation.linear_results import Outcome
from train.linear import LinearConfig, check_batch, evaluate
from train.storage.run_folder import read_lines

ROOT = Path(__file__).resolve().parents[3]
ALONE = DistContext.alone(torch.device("cpu"))
PROBE = ProbeConfig(epochs=3, global_batch=12, base_lr=1.0)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def val_path(photo_folder: Path, photo_dataset_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """31 of the images: a number that no number of ranks divides."""
    out = tmp_path_factory.mktemp("val") / "val"
    options = ShardingOptions(limit=31, classes_from=photo_dataset_path, seed=1)
    make_dataset(str(photo_folder), out, options, quiet=True, in_process=True)
    return out


@pytest.fixture
def config(photo_dataset_path: Path, val_path: Path) -> LinearConfig:
    return LinearConfig(
        data=photo_dataset_path,
        val_data=val_path,
        encoder=EncoderConfig("untrained:resnet_tiny", image_size=16),
        device="cpu",
        probe=PROBE,
        loader=LoaderConfig(backend="torchvision", threads=1),
    )


def lars_by_formula(
    weights: Tensor, gradients: list[Tensor], rates: list[float], momentum: float, weight_decay: float
) -> Tensor:
    """You et al. 2017, algorithm 1, with the layer's rate outside of the momentum's sum over constant global rates."""
    velocity = torch.zeros_like(weights)
    for gradient, rate in zip(gradients, rates, strict=True):
        norm, gradient_norm = weights.norm(), gradient.norm()
        local = 1.0 if norm == 0 else 0.001 * norm / (gradient_norm + weight_decay * norm)
        velocity = momentum * velocity + local * (gradient + weight_decay * weights)
        weights = weights - rate * velocity
    return weights


@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
def test_lars_is_that_of_the_formula(weight_decay: float) -> None:
    config = ProbeConfig(base_lr=0.1, weight_decay=weight_decay)
    heads = LinearHeads(1, 6, 3, seed=0)
    optimizer = build_lars(config, heads)
    (head,) = heads.heads
    before = head.weight.detach().clone(), head.bias.detach().clone()
    generator = torch.Generator().manual_seed(1)
    gradients = [(torch.randn(3, 6, generator=generator), torch.randn(3, generator=generator)) for _ in range(5)]
    for step, (weight, bias) in enumerate(gradients):
        head.weight.grad, head.bias.grad = weight.clone(), bias.clone()
        set_rates(optimizer, step, total_steps=5)
        optimizer.step()
    # Half a cosine from the linearly scaled rate: 0.1 x 4096 / 256.
    rates = [1.6 * 0.5 * (1 + np.cos(np.pi * step / 5)) for step in range(5)]
    for value, start, part in zip((head.weight, head.bias), before, zip(*gradients, strict=True), strict=True):
        expected = lars_by_formula(start, list(part), rates, 0.9, weight_decay)
        torch.testing.assert_close(value.detach(), expected, rtol=1e-5, atol=1e-7)


def train(lr_sweep: str) -> list[Tensor]:
    """The heads' weights after some steps on random features."""
    config = ProbeConfig(global_batch=64, lr_sweep=lr_sweep)
    heads = LinearHeads(len(config.base_lrs()), 8, 4, seed=3)
    optimizer = build_lars(config, heads)
    generator = torch.Generator().manual_seed(2)
    for step in range(10):
        set_rates(optimizer, step, 10)
        optimizer.zero_grad(set_to_none=True)
        features, labels = torch.randn(32, 8, generator=generator), torch.randint(4, (32,), generator=generator)
        head_losses(heads(features), labels).sum().backward()
        optimizer.step()
    return [head.weight.detach() for head in heads.heads]


def test_each_rate_of_a_sweep_trains_as_if_alone() -> None:
    on_all_ranks = train("0.02,0.1,30")
    for weights, rate in zip(on_all_ranks, ("0.02", "0.1", "30"), strict=True):
        torch.testing.assert_close(weights, train(rate)[0], rtol=1e-6, atol=1e-8)
    assert (on_all_ranks[0] - on_all_ranks[2]).abs().max() > 1e-3


def test_losses_are_means_over_the_batch() -> None:
    logits, labels = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1])
    expected = [-F.log_softmax(part, 1)[range(5), labels].mean() for part in logits]
    torch.testing.assert_close(head_losses(logits, labels), torch.stack(expected))


@pytest.mark.parametrize("at_once", [2, 8192])
def test_hits_counted_by_hand(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr("train.evaluation.linear_probe.FEATURES_AT_ONCE", at_once)
    heads = LinearHeads(2, 7, 7, seed=0)
    for head, sign in zip(heads.heads, (1.0, -1.0), strict=True):
        head.weight.data.copy_(sign * torch.eye(7))
    ranked = torch.arange(7.0).expand(3, 7)  # class 6 first, class 0 last; the other head sees it the other way round
    assert count_correct(heads, ranked, torch.tensor([6, 2, 1])).tolist() == [[1, 2], [0, 2]]
    few = LinearHeads(1, 2, 2, seed=0)
    assert count_correct(few, torch.ones(3, 2), torch.tensor([0, 1, 1]))[0, 1] == 3  # all classes are among the first 5


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 1.0])
def test_fractions_are_stratified_nested_and_fixed(fraction: float) -> None:
    labels = np.repeat([0, 1, 2], [1000, 400, 60])[np.random.default_rng(0).permutation(1460)]
    classes = ("a", "b", "c")
    ids = stratified(labels, fraction, classes, seed=0)
    expected = [round(fraction * n + 1e-9) for n in (1000, 400, 60)]
    assert np.bincount(labels[ids], minlength=3).tolist() == expected
    assert len(set(ids.tolist())) == len(ids)
    assert np.array_equal(ids, stratified(labels, fraction, classes, seed=0))
    assert set(ids) <= set(stratified(labels, min(1.0, 2 * fraction), classes, seed=0))
    if fraction < 1:
        assert not np.array_equal(ids, stratified(labels, fraction, classes, seed=1))


def test_a_fraction_that_empties_a_class() -> None:
    with pytest.raises(UserError, match=r"--fraction 0.01 leaves no sample of 1 of 3 classes, b \(12 samples\).*0.042"):
        stratified(np.repeat([0, 1], [1000, 12]), 0.01, ("a", "b", "absent"), seed=0)


@pytest.mark.parametrize("samples", [1, 12, 100, 111, 1300])
def test_the_fraction_that_is_advised_is_enough(samples: int) -> None:
    labels = np.repeat([0, 1], [100_000, samples])
    with pytest.raises(UserError) as raised:
        stratified(labels, 0.0001, ("a", "b"), seed=0)
    advised = float(str(raised.value).split("take at least ")[1])
    assert (labels[stratified(labels, advised, ("a", "b"), seed=0)] == 1).sum() == 1
    assert advised < 1.15 * 0.5 / samples


def counts(outcome: Outcome) -> list[tuple[int, int, int]]:
    return [(head.correct1, head.correct5, head.total) for head in outcome.heads]


@pytest.fixture(scope="module")
def colours_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 images whose class is their colour: what any encoder must leave visible."""
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for label, colour in enumerate(((220, 30, 30), (30, 220, 30), (30, 30, 220), (128, 128, 128))):
        (root / "images" / str(label)).mkdir(parents=True)
        for i in range(12):
            pixels = np.clip(rng.normal(colour, 20, (24, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / "images" / str(label) / f"{i}.png")
    make_dataset(str(root / "images"), root / "dataset", ShardingOptions(), quiet=True, in_process=True)
    return root / "dataset"


@pytest.mark.parametrize("features_cache", [False, True])
def test_an_evaluation_learns_and_leaves_its_numbers(
    config: LinearConfig, colours_path: Path, tmp_path: Path, features_cache: bool
) -> None:
    probe = ProbeConfig(epochs=25, global_batch=48, lr_sweep="1e-6,1000")
    config = replace(config, data=colours_path, val_data=colours_path, run_dir=tmp_path / "run", probe=probe)
    outcome = evaluate(replace(config, features_cache=features_cache), ALONE)
    still, learned = outcome.heads
    assert learned.loss < still.loss
    assert learned.correct1 > still.correct1
    assert learned.top1 > 90
    assert learned.correct5 == learned.total == 48  # four classes
    assert outcome.best == learned
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [(line["epoch"], line["base_lr"]) for line in lines] == [
        (e, lr) for e in range(1, 26) for lr in (1e-6, 1000)
    ]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["finished"]
    assert summary["val_top1"] == pytest.approx(100 * learned.correct1 / 48)
    assert [head["base_lr"] for head in summary["heads"]] == [1e-6, 1000]


def test_the_encoder_stays_as_it_was(config: LinearConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def open_and_keep(*arguments: Any) -> Any:
        opened.append(open_frozen(*arguments))
        return opened[0]

    monkeypatch.setattr(linear, "open_frozen", open_and_keep)
    evaluate(config, ALONE)
    fresh = open_frozen(config.encoder, torch.device("cpu")).backbone
    assert not opened[0].backbone.training
    for name, value in opened[0].backbone.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name


def test_parts_of_a_batch_change_no_count(config: LinearConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate(config, ALONE)
    monkeypatch.setattr(linear, "IMAGES_PER_PASS", 3)
    parts = evaluate(config, ALONE)
    assert counts(parts) == counts(whole)
    assert parts.best.loss == pytest.approx(whole.best.loss, rel=1e-5)


def test_an_interrupted_evaluation_goes_on(
    config: LinearConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = evaluate(replace(config, run_dir=tmp_path / "undisturbed"), ALONE)
    done = linear.train_epoch

    def break_off(*arguments: Any) -> list[float]:
        if arguments[-1] == 2:
            raise KeyboardInterrupt
        return done(*arguments)

    interrupted = replace(config, run_dir=tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(linear, "train_epoch", break_off)
        with pytest.raises(KeyboardInterrupt):
            evaluate(interrupted, ALONE)
    assert evaluate(replace(interrupted, resume=True), ALONE) == undisturbed
    names = ("metrics.jsonl", "summary.json")
    for name in names:
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    with pytest.raises(UserError, match="already holds a run: add --resume"):
        evaluate(interrupted, ALONE)
    with pytest.raises(UserError, match=r"another configuration:\n  fraction: checkpoint 1\.0, now 0\.5"):
        evaluate(replace(interrupted, resume=True, fraction=0.5), ALONE)


def test_two_ranks_give_the_accuracy_of_one_to_the_sample(
    photo_dataset_path: Path, val_path: Path, tmp_path: Path
) -> None:
    one = evaluate_both(photo_dataset_path, val_path, tmp_path / "1", ALONE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [
        str(ROOT / "tests" / "helpers" / "both_evaluations.py"),
        *map(str, (photo_dataset_path, val_path, tmp_path / "2")),
    ]
    ended = subprocess.run(
        [*launcher, *script],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    two = numbers(tmp_path / "2")
    assert one == two
    assert len(one) == 2 + 3 + 3  # two k, three rates on crops, three on cached features
    assert all(total == 31 for *_, total in one)


def run_script(monkeypatch: pytest.MonkeyPatch, config: LinearConfig, more: list[str]) -> int:
    data = ["--data", str(config.data), "--val-data", str(config.val_data), "--checkpoint", "untrained:resnet_tiny"]
    small = ["--image-size", "16", "--epochs", "1", "--global-batch", "12", "--device", "cpu"]
    return call(monkeypatch, linear, *data, *small, "--backend", "torchvision", *more)


def test_the_script(config: LinearConfig, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert run_script(monkeypatch, config, ["--fraction", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "24 samples of 4 classes" in out
    assert "base lr 0.1 (peak 0.0046875)" in out
    assert "top-5 100.00 %" in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--checkpoint", "/nowhere.pth"], "cannot read the checkpoint /nowhere.pth"),
        (["--checkpoint", "setup.py"], "setup.py is no checkpoint"),
        (["--checkpoint", "untrained:resnet51"], "untrained:resnet51 is unknown"),
        (["--fraction", "0"], "--fraction 0.0: it must be above 0"),
        (["--fraction", "0.01"], "leaves no sample of 4 of 4 classes"),
        (["--global-batch", "64"], "more than the 48 samples to train on"),
        (["--lr-sweep", "0.1,0.1"], "--lr-sweep 0.1,0.1: write different rates above 0"),
        (["--lr-sweep", "fast"], "--lr-sweep fast"),
        (["--base-lr", "0"], "--base-lr 0.0"),
        (["--epochs", "0"], "--epochs 0"),
        (["--momentum", "1.5"], "--momentum 1.5: it must be at least 0 and below 1"),
        (["--weight-decay", "nan"], "--weight-decay nan"),
        (["--seed", "-1"], "--seed -1"),
        (["--image-size", "0"], "--image-size 0"),
        (["--resume"], "--resume: say with --run-dir"),
        (["--run-dir", "/dev/null/x"], "--run-dir /dev/null/x cannot be made"),
    ],
)
def test_mistakes(
    config: LinearConfig, monkeypatch: pytest.MonkeyPatch, capsys: Any, more: list[str], message: str
) -> None:
    monkeypatch.chdir(ROOT)
    assert run_script(monkeypatch, config, more) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("samples", "processes", "batch"),
    [
        (1_281_167, 8, 4096),
        (65_536, 1, 4096),
        (50_000, 1, 2048),
        (5000, 1, 256),
        (5000, 3, 192),
        (48, 1, 16),
        (48, 3, 12),
        (10, 1, 8),
        (2, 4, 4),
    ],
)
def test_the_default_batch_fits_the_data(samples: int, processes: int, batch: int) -> None:
    assert ProbeConfig().fitted(samples, processes).global_batch == batch
    assert ProbeConfig(global_batch=7).fitted(samples, processes).global_batch == 7


def test_a_line_says_when_lars_cannot_move_and_when_the_sweep_is_too_narrow(
    config: LinearConfig, colours_path: Path, capsys: Any
) -> None:
    def said(probe: ProbeConfig) -> str:
        cached = replace(config, data=colours_path, val_data=colours_path, probe=probe, features_cache=True)
        evaluate(cached, ALONE)
        return capsys.readouterr().out

    few = said(ProbeConfig(epochs=3))
    assert "9 = 3 epochs x 3 of 16" in few
    # 9 steps x half of the peak 0.1 x 16 / 256 x 0.001 x 10 for the momentum
    assert "move the classifier's weights by 0.028 % of their length at most" in few
    assert "--lr-sweep" not in few
    many = said(ProbeConfig(epochs=25, lr_sweep="1e-6,1000"))
    assert "of their length at most" not in many
    assert "note: the best rate, 1000, is the highest of --lr-sweep: try 3e+03 as well" in many
    assert "--lr-sweep" not in said(ProbeConfig(epochs=25, lr_sweep="1e-6,1000,1e-5,1e9"))


def test_a_batch_that_the_processes_cannot_share_is_told_with_one_that_they_can(config: LinearConfig) -> None:
    with pytest.raises(UserError, match=r"--global-batch 12 .* 5 processes: take a multiple of 5, 10 or 15"):
        check_batch(replace(config.probe, global_batch=12), samples=48, world_size=5)


def test_datasets_that_do_not_fit(config: LinearConfig, photo_folder: Path, tmp_path: Path) -> None:
    flat = photo_folder / ShardSet.open(config.data).classes[0]
    make_dataset(str(flat), tmp_path / "flat", ShardingOptions(), quiet=True, in_process=True)
    with pytest.raises(UserError, match=r"--val-data .* has no labels"):
        evaluate(replace(config, val_data=tmp_path / "flat"), ALONE)
    options = ShardingOptions(limit=20)
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for i, folder in enumerate(sorted(photo_folder.iterdir())):
        (renamed / f"class {i}").symlink_to(folder)
    make_dataset(str(renamed), tmp_path / "other", options, quiet=True, in_process=True)
    told = r"--val-data .* has other classes than .* \(only there 4, class 0, .*; only in --data 4, .*--classes-from"
    with pytest.raises(UserError, match=told):
        evaluate(replace(config, val_data=tmp_path / "other"), ALONE)


def test_classes_in_another_order_do_not_fit(photo_dataset: ShardSet) -> None:
    turned = copy(photo_dataset)
    turned.classes = photo_dataset.classes[::-1]
    with pytest.raises(UserError, match=r"other classes than .*the same names, but numbered in another order"):
        check_same_classes("--val-data", turned, photo_dataset)
    check_same_classes("--val-data", copy(photo_dataset), photo_dataset)
