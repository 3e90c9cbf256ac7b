"""Targets that remember: the formulas by hand, k = 1 against SimSiam as it is, resumed and shared runs bit for bit."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.methods import simsiam as simsiam_module
from model.methods.base import StepInfo
from model.methods.simsiam import SimSiam, SimSiamConfig, averaged_targets
from pipeline.common.errors import UserError
from pipeline.dataset.dataset import ShardSet
from pipeline.loader.config import LoaderConfig
from pipeline.loader.loader import open_views
from pipeline.sampling.sampler import BatchSampler
from pipeline.sampling.views import PAIR_EPOCHS, ViewRecipe, draw_views
from tests.train.test_pretrain import alone, flags, global_batches, losses, run_here, torchrun, views
from train.config.recipes import parse_config
from train.engine import loop as loop_module
from train.engine.build import prepare
from train.engine.sample_memory import SampleMemory
from train.storage.checkpoints import load_checkpoint, save_checkpoint

TINY = SimSiamConfig("resnet_tiny", dim=8, projector_hidden=8)
FROZEN = ["--targets", "frozen", "--target-steps", "3"]
AVERAGED = ["--targets", "moving-average", "--predictor", "none"]
pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = [FROZEN, [*FROZEN[:-1], "epoch"], AVERAGED, [*AVERAGED, "--target-memory", "disk"]]


def test_rows_come_back_to_their_images(tmp_path: Path) -> None:
    memory = SampleMemory(5, 2, "ram", alone())
    memory.allocate(tmp_path)
    assert not memory.read(np.arange(5)).any()  # no past
    memory.write(np.array([3, 1]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert memory.read(np.array([1, 3, 3])).tolist() == [[3.0, 4.0], [1.0, 2.0], [1.0, 2.0]]
    others = np.load(tmp_path / memory.save(tmp_path, 3)()["file"])[[0, 2, 4]]
    assert not others.any()


def average(memory: SampleMemory, config: SimSiamConfig, z1: list[list[float]], z2: list[list[float]]) -> Any:
    """A pass of section 5.2's averages: both targets, the memory's rows replaced."""
    ids = np.arange(len(z1))
    first, second, rows = averaged_targets(config, torch.tensor(z1), torch.tensor(z2), memory.read(ids))
    memory.write(ids, rows)
    return first, second


def test_the_average_by_hand(tmp_path: Path) -> None:
    memory, config = SampleMemory(1, 2, "ram", alone()), SimSiamConfig(dim=2, target_momentum=0.8)
    memory.allocate(tmp_path)
    first = average(memory, config, [[1.0, 0.0]], [[0.0, 2.0]])
    assert (first[0].tolist(), first[1].tolist()) == ([[1.0, 0.0]], [[0.0, 2.0]])  # no past: F(T'(x)) itself
    second = average(memory, config, [[1.0, 1.0]], [[2.0, 0.0]])
    # eta was the mean of both, (0.5, 1); now 0.8 eta + 0.2 F
    torch.testing.assert_close(second[0], torch.tensor([[0.6, 1.0]]))
    torch.testing.assert_close(second[1], torch.tensor([[0.8, 0.8]]))
    third = average(memory, config, [[0.0, 0.0]], [[0.0, 0.0]])
    torch.testing.assert_close(third[0], 0.8 * torch.tensor([[0.7, 0.9]]))


def test_one_side_averages_its_target_view_alone(tmp_path: Path) -> None:
    memory, config = SampleMemory(1, 1, "ram", alone()), SimSiamConfig(dim=1, target_momentum=0.5, symmetric=False)
    memory.allocate(tmp_path)
    average(memory, config, [[100.0]], [[2.0]])
    assert average(memory, config, [[100.0]], [[4.0]])[1].item() == pytest.approx(3.0)


def test_a_projection_that_is_no_number_is_not_remembered(tmp_path: Path) -> None:
    """Or every later step with this image would be skipped."""
    memory, config = SampleMemory(2, 2, "ram", alone()), SimSiamConfig(dim=2, target_momentum=0.5)
    memory.allocate(tmp_path)
    average(memory, config, [[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0], [3.0, 4.0]])
    broken = average(memory, config, [[float("nan"), 0.0], [1.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]])
    assert broken[0][0].isnan().any()  # this step is to be skipped
    after = average(memory, config, [[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(after[0], torch.tensor([[0.5, 1.0], [1.0, 1.0]]))


def test_the_copy_is_renewed_every_k_steps_and_only_then() -> None:
    torch.manual_seed(0)
    model = replace(TINY, targets="frozen", target_steps=2).build()
    assert isinstance(model, SimSiam)
    assert model.frozen is not None
    x = torch.randn(4, 3, 16, 16)
    seen, fresh = [], []
    for step in range(5):
        model.before_step(StepInfo(step, 10, 5, 4))
        fresh.append(model.projector(model.backbone(x)).detach())
        seen.append(model.frozen(x))
        with torch.no_grad():
            for module in (model.backbone, model.projector, model.predictor):
                for weight in module.parameters():
                    weight.mul_(0.9).add_(0.01)
    for step, source in enumerate([0, 0, 2, 2, 4]):
        assert torch.equal(seen[step], fresh[source])
    assert not torch.allclose(fresh[0], fresh[2], atol=1e-3)
    assert not any(weight.requires_grad for weight in model.frozen.parameters())


def test_the_first_checkpoints_hold_the_frozen_copy_apart(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(monkeypatch, photo_dataset_path, tmp_path / "whole", *FROZEN)
    run(monkeypatch, photo_dataset_path, tmp_path / "run", *FROZEN, "--max-steps", "5")
    folder = tmp_path / "run" / "checkpoints"
    path = max(folder.iterdir())
    state = load_checkpoint(path)
    model = state["model"]
    frozen = {name.removeprefix("frozen.module."): model.pop(name) for name in list(model) if "frozen" in name}
    assert len(frozen) > 10
    path.unlink()
    state |= {"targets": {"frozen": frozen, "renewed_at": 3}}
    save_checkpoint(folder, state, 5, keep=3)
    assert run(monkeypatch, photo_dataset_path, tmp_path / "run", *FROZEN, "--resume") == whole


def run(monkeypatch: pytest.MonkeyPatch, data: Path, run_dir: Path, *more: str) -> dict[int, float]:
    assert run_here(monkeypatch, flags(data, run_dir, "--knn-every", "0", *more)) == 0
    return losses(run_dir)


def test_renewed_every_step_it_is_simsiam_to_the_bit(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(monkeypatch, photo_dataset_path, tmp_path / "plain")
    frozen = ["--targets", "frozen", "--target-steps"]
    assert run(monkeypatch, photo_dataset_path, tmp_path / "1", *frozen, "1") == plain
    every_epoch = run(monkeypatch, photo_dataset_path, tmp_path / "epoch", *frozen, "epoch")
    assert every_epoch == run(monkeypatch, photo_dataset_path, tmp_path / "4", *frozen, "4")  # steps of an epoch
    assert every_epoch[1] == plain[1]
    assert every_epoch[2] != plain[2]


@pytest.mark.parametrize("kind", KINDS, ids=["frozen", "frozen for an epoch", "average in ram", "average on disk"])
def test_resumed_it_is_bit_for_bit_the_undisturbed_run(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: list[str]
) -> None:
    whole = run(monkeypatch, photo_dataset_path, tmp_path / "whole", *kind)
    assert len(set(whole.values())) == len(whole)
    part = run(monkeypatch, photo_dataset_path, tmp_path / "run", *kind, "--max-steps", "5")
    assert list(part) == [1, 2, 3, 4, 5]
    assert run(monkeypatch, photo_dataset_path, tmp_path / "run", *kind, "--resume") == whole


def test_ram_and_disk_are_the_same_and_a_run_may_change_between_them(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ram = run(monkeypatch, photo_dataset_path, tmp_path / "ram", *AVERAGED)
    run(monkeypatch, photo_dataset_path, tmp_path / "run", *AVERAGED, "--max-steps", "5")
    on_disk = [*AVERAGED, "--target-memory", "disk", "--resume"]
    assert run(monkeypatch, photo_dataset_path, tmp_path / "run", *on_disk) == ram
    newest = max((tmp_path / "ram" / "checkpoints").glob("targets-*.npy"))
    assert np.array_equal(np.load(tmp_path / "run" / "targets-rank0.npy"), np.load(newest))


def test_two_ranks_keep_the_rows_of_one_process_with_two_passes(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank's batch norm sees what each of two accumulated passes sees, so that all numbers must agree."""
    kind = [*AVERAGED, "--target-memory", "disk", "--knn-every", "0"]
    one = run(monkeypatch, photo_dataset_path, tmp_path / "one", *kind, "--accumulate", "2")
    ended = torchrun(2, flags(photo_dataset_path, tmp_path / "two", *kind, "--no-sync-bn"))
    assert ended.returncode == 0, ended.stderr
    rows = [np.load(tmp_path / run_dir / f"targets-rank{rank}.npy") for run_dir, rank in (("two", 0), ("two", 1))]
    assert np.array_equal(*rows)
    np.testing.assert_allclose(rows[0], np.load(tmp_path / "one" / "targets-rank0.npy"), atol=2e-3)
    assert rows[0].any(axis=1).all()  # every sample was seen
    assert losses(tmp_path / "two")[8] == pytest.approx(one[8], abs=1e-3)


def test_files_of_deleted_checkpoints_go(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = ["--checkpoint-every", "1steps", "--keep-checkpoints", "2"]
    run(monkeypatch, photo_dataset_path, tmp_path / "run", *AVERAGED, *keep)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("targets-*"))
    assert names[-2:] == ["targets-000000007.npy", "targets-000000008.npy"]
    assert len(names) <= 3  # one goes when the next is written


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_checkpoint_without_its_targets_is_refused(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, damage: str
) -> None:
    run(monkeypatch, photo_dataset_path, tmp_path / "run", *AVERAGED, "--max-steps", "3")
    (file,) = (tmp_path / "run" / "checkpoints").glob("targets-*.npy")
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-4])
    arguments = flags(photo_dataset_path, tmp_path / "run", *AVERAGED, "--knn-every", "0", "--resume")
    assert run_here(monkeypatch, arguments) == 2
    assert f"{file}, the targets that belong to the newest checkpoint, is missing or damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--targets", "frozen", "--no-stop-gradient"], "only --targets encoder has a gradient to let through"),
        (["--target-steps", "10"], "--target-steps 10 is for --targets frozen, not for encoder"),
        (["--targets", "frozen", "--target-steps", "0"], "--target-steps 0: it must be at least 1"),
        (["--target-momentum", "1.0"], "--target-momentum 1.0: it must be at least 0 and below 1"),
        (["--pairs", "0"], "--pairs 0: it must be at least 1"),
    ],
)
def test_mistakes(
    photo_dataset_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    more: list[str],
    message: str,
) -> None:
    assert run_here(monkeypatch, flags(photo_dataset_path, tmp_path / "run", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="space is reserved on Linux alone")
def test_a_disk_too_small_for_the_rows_is_told_before_the_first_step(tmp_path: Path) -> None:
    too_many = 1 << 50  # rows; no file system of this machine holds 8 PiB
    memory = SampleMemory(too_many, 2, "disk", alone())
    with pytest.raises(UserError, match="targets-rank0"):
        memory.allocate(tmp_path)


def test_two_pairs_are_the_same_samples_in_other_views(photo_dataset: ShardSet) -> None:
    recipe = ViewRecipe(image_size=16)
    sampler, loader = BatchSampler(0, 12, epochs=2), LoaderConfig(backend="torchvision", threads=1)
    with open_views(photo_dataset, recipe, loader, sampler, alone()) as batches:
        single = list(batches)
    with open_views(photo_dataset, recipe, loader, sampler, alone(), pairs=2) as batches:
        double = list(batches)
    assert [(b.epoch, b.step, b.pair) for b in double] == [(e, s, p) for e in (0, 1) for s in range(4) for p in (0, 1)]
    for plain, first, second in zip(single, double[::2], double[1::2], strict=True):
        assert plain.ids.tolist() == first.ids.tolist() == second.ids.tolist()
        assert torch.equal(plain.x1, first.x1)
        assert torch.equal(plain.x2, first.x2)
        assert not torch.allclose(plain.x1, second.x1, atol=0.1)
    sizes = photo_dataset.sizes(double[0].ids)
    crops = [draw_views(recipe, 0, epoch, double[0].ids, sizes).crop for epoch in (0, 1, PAIR_EPOCHS)]
    assert not np.array_equal(crops[0], crops[2])
    assert not np.array_equal(crops[1], crops[2])


def test_a_step_is_the_mean_over_its_pairs_and_counts_each_sample_once(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asymmetric = ["--no-symmetric", "--knn-every", "0"]
    run(monkeypatch, photo_dataset_path, tmp_path / "one", *asymmetric)
    run(monkeypatch, photo_dataset_path, tmp_path / "two", *asymmetric, "--pairs", "2")
    assert global_batches(tmp_path / "two", 1) == global_batches(tmp_path / "one", 1)
    prepared = prepare(parse_config(flags(photo_dataset_path, tmp_path / "x", "--pairs", "2")), alone())
    prepared.model.train()
    torch.manual_seed(3)
    pairs = [views(torch.randn(12, 3, 16, 16), torch.randn(12, 3, 16, 16)) for _ in range(2)]
    expected = sum(simsiam_module.simsiam_loss(*prepared.model(pair.x1, pair.x2)).item() for pair in pairs) / 2
    result = loop_module.train_step(prepared, iter(pairs))
    assert result.loss.item() == pytest.approx(expected, abs=1e-6)


def test_checkpoints_from_before_these_switches_fit(tmp_path: Path) -> None:
    """At their defaults they are no part of a run's identity; away from them they are."""
    plain = parse_config(flags(tmp_path, tmp_path)).identity("x")
    assert not [name for name in plain if "target" in name or "pairs" in name]
    assert plain["model.predictor_hidden"] == 4
    assert parse_config(flags(tmp_path, tmp_path, "--pairs", "2")).identity("x")["model.pairs"] == 2
    frozen = parse_config(flags(tmp_path, tmp_path, *FROZEN)).identity("x")
    assert (frozen["model.targets"], frozen["model.target_steps"]) == ("frozen", 3)
