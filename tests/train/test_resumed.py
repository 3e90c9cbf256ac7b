"""--resume takes the run's configuration, and flags given as well must agree with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.common.errors import UserError
from tests.train.test_pretrain import STEPS, flags, losses, run_here
from train.config.recipes import parse_config
from train.config.run_config import PretrainConfig
from train.storage.checkpoints import load_checkpoint, newest_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN = ["--knn-every", "0"]


@pytest.fixture(scope="module")
def begun(photo_dataset_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped after 3 of its 8 steps."""
    run_dir = tmp_path_factory.mktemp("runs") / "begun"
    with pytest.MonkeyPatch.context() as patch:
        assert run_here(patch, flags(photo_dataset_path, run_dir, *PLAIN, "--max-steps", "3")) == 0
    return run_dir


@pytest.fixture
def copied(begun: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "run"))


def resumed(run_dir: Path, *more: str) -> PretrainConfig:
    return parse_config(["--resume", "--run-dir", str(run_dir), *more])


def test_resume_alone_goes_on_to_the_end_from_any_folder(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "work" / "data").symlink_to(photo_dataset_path)
    monkeypatch.chdir(tmp_path / "work")
    run_dir = Path("run")
    assert run_here(monkeypatch, flags(Path("data"), run_dir, *PLAIN, "--max-steps", "3")) == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    capsys.readouterr()
    assert run_here(monkeypatch, ["--run-dir", "../work/run", "--resume"]) == 0
    out = capsys.readouterr().out
    assert out.index("going on after step 3 of 8") < out.index("plan for ")
    assert "  weights      of the checkpoint" in out
    assert list(losses(tmp_path / "work" / "run")) == list(range(1, STEPS + 1))


def test_the_configuration_is_the_runs_but_for_its_max_steps(begun: Path, photo_dataset_path: Path) -> None:
    first = parse_config(flags(photo_dataset_path, begun, *PLAIN))
    assert resumed(begun) == PretrainConfig(**{**vars(first), "resume": True})
    assert parse_config(["--resume", f"--run_dir={begun}"]) == resumed(begun)
    free = resumed(begun, "--threads", "3", "--accumulate", "2", "--precision", "fp32", "--max-steps", "5")
    assert (free.loader.threads, free.accumulate, free.precision, free.max_steps) == (3, 2, "fp32", 5)
    assert free.model == first.model


@pytest.mark.parametrize(
    ("given", "messages"),
    [
        (["--seed", "1"], ["--seed: the run has 0, given is 1"]),
        (
            ["--base-lr", "0.1", "--dim", "32"],
            ["--base-lr: the run has 0.05, given is 0.1", "--dim: the run has 16, given is 32"],
        ),
        (["--no-symmetric"], ["--symmetric: the run has on, given is off"]),
        (["--views", "4"], ["--views: the run has 2, given is 4"]),
        (["--crop-scale", "0.1", "1"], ["--crop-scale: the run has 0.2 1.0, given is 0.1 1.0"]),
        (["--erasing.prob", "0.5"], ["--erasing.prob: the run has 0.0, given is 0.5"]),
        (["--more-views", "count=2 image-size=12"], ["--more-views: the run has none, given is count=2 image-size=12"]),
        (["--epoch-order", "blocks"], ["--epoch-order: the run has random, given is blocks"]),
        (["--optimizer", "lars"], ["--optimizer: the run has auto, given is lars"]),
        (["--recipe", "demo"], ["--recipe: the run has none, given is demo"]),
        (["--method", "byol"], ["--method: the run has simsiam, given is byol"]),
        (["--epochs", "3"], ["--epochs: the run has 2, given is 3", "start a new run from its weights: --init"]),
        (["--init", "weights.pt"], ["--init: the run has none, given is weights.pt"]),
    ],
)
def test_flags_that_disagree_are_named_before_anything_is_done(
    given: list[str],
    messages: list[str],
    begun: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    assert run_here(monkeypatch, ["--run-dir", str(begun), "--resume", *given]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("error: ") == 1
    for message in [*messages, f"--resume: flags disagree with the run in {begun}"]:
        assert message in printed.err
    assert printed.err.count("given is") == len(messages) - ("--epochs" in given)


def test_flags_that_agree_may_be_given(begun: Path, photo_dataset_path: Path) -> None:
    assert resumed(begun, "--epochs", "2", "--method", "simsiam", "--seed", "0") == resumed(begun)
    assert resumed(begun, "--erasing.area", "0.1", "0.2").run_dir == begun  # an augmentation that is off


def test_a_folder_without_a_run(tmp_path: Path, photo_dataset_path: Path) -> None:
    with pytest.raises(UserError, match=r"--resume, but --run-dir .*none holds no run"):
        resumed(tmp_path / "none")
    new = parse_config(flags(photo_dataset_path, tmp_path / "none", "--resume"))
    assert new.data == photo_dataset_path


def test_another_dataset_is_refused_before_the_plan(
    copied: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, photo_dataset_path: Path, capsys: Any
) -> None:
    moved = Path(shutil.copytree(photo_dataset_path, tmp_path / "moved"))
    state = load_checkpoint(newest_checkpoint(copied / "checkpoints"))  # type: ignore[arg-type]
    state["identity"]["dataset"] = "of other images"
    save_checkpoint(copied / "checkpoints", state, 3, keep=1)
    assert run_here(monkeypatch, ["--run-dir", str(copied), "--resume", "--data", str(moved)]) == 2
    printed = capsys.readouterr()
    assert "plan for" not in printed.out
    assert "dataset: checkpoint of other images, now " in printed.err


def test_the_same_dataset_may_lie_elsewhere(
    copied: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, photo_dataset_path: Path
) -> None:
    moved = Path(shutil.copytree(photo_dataset_path, tmp_path / "moved"))
    arguments = ["--run-dir", str(copied), "--resume", "--data", str(moved), "--max-steps", "4"]
    assert run_here(monkeypatch, arguments) == 0
    assert json.loads((copied / "config.json").read_text())["data"] == str(moved)


def weights_of(run_dir: Path, path: Path) -> Path:
    newest = newest_checkpoint(run_dir / "checkpoints")
    assert newest is not None
    return Path(shutil.copy(newest, path))


def other_weights(path: Path) -> None:
    """The same file with one weight changed."""
    state = torch.load(path)
    state["model"]["backbone.conv1.weight"] += 1
    torch.save(state, path)


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("spelled", "change", "message"),
    [
        (lambda path: path.parent / "." / "x" / ".." / path.name, None, None),
        (lambda path: Path(shutil.copy(path, path.with_name("copy.pt"))), None, None),
        (lambda path: path, remove, None),  # the run has its own weights by now
        (lambda path: None, other_weights, None),  # not given: nothing to compare
        (lambda path: path, other_weights, "holds other weights than those which the run in"),
        (lambda path: path.with_name("none.pt"), None, "cannot read the checkpoint"),
    ],
)
def test_init_is_compared_by_its_content(
    spelled: Callable[[Path], Path | None],
    change: Callable[[Path], None] | None,
    message: str | None,
    begun: Path,
    photo_dataset_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    (tmp_path / "x").mkdir()
    weights = weights_of(begun, tmp_path / "w.pt")
    run_dir = tmp_path / "run"
    assert (
        run_here(monkeypatch, flags(photo_dataset_path, run_dir, *PLAIN, "--max-steps", "1", "--init", str(weights)))
        == 0
    )
    given = spelled(weights)
    if change is not None:
        change(weights)
    arguments = ["--run-dir", str(run_dir), "--resume", "--max-steps", "2"]
    code = run_here(monkeypatch, [*arguments, *(["--init", str(given)] if given else [])])
    assert code == (0 if message is None else 2)
    assert (message or "") in capsys.readouterr().err
    assert list(losses(run_dir)) == ([1, 2] if message is None else [1])


def test_the_path_of_init_in_an_older_checkpoint(
    begun: Path, photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was recorded as it was given, and config.json had no identity of the weights."""
    weights = weights_of(begun, tmp_path / "w.pt")
    monkeypatch.chdir(tmp_path)
    run_dir, arguments = tmp_path / "run", ["--init", "w.pt", *PLAIN]
    assert run_here(monkeypatch, flags(photo_dataset_path, run_dir, *arguments, "--max-steps", "1")) == 0
    state = load_checkpoint(newest_checkpoint(run_dir / "checkpoints"))  # type: ignore[arg-type]
    state["identity"]["init"] = "w.pt"
    save_checkpoint(run_dir / "checkpoints", state, 1, keep=1)
    config = json.loads((run_dir / "config.json").read_text())
    assert len(config.pop("init_weights")) == 16
    (run_dir / "config.json").write_text(json.dumps({**config, "init": "w.pt"}))
    copy = shutil.copy(weights, tmp_path / "copy.pt")
    assert run_here(monkeypatch, flags(photo_dataset_path, run_dir, *arguments, "--resume", "--max-steps", "2")) == 0
    again = ["--run-dir", str(run_dir), "--resume", "--init", str(copy), "--max-steps", "3"]
    assert run_here(monkeypatch, again) == 0
    assert list(losses(run_dir)) == [1, 2, 3]
