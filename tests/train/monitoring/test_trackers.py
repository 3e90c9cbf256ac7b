"""Trackers: the run keeps its id, no failure of one reaches the training, no secret leaves. Nothing needs a network."""

from __future__ import annotations

import json
import struct
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.common.errors import UserError
from pipeline.common.secrets import conceal
from tests.train.test_pretrain import CPU, run_here
from train.config.recipes import parse_config
from train.config.run_config import PretrainConfig
from train.config.tracker_config import TrackerConfig
from train.monitoring import trackers
from train.monitoring.trackers import TRACKERS_FILE, open_trackers
from train.storage.run_folder import read_lines

SECRET = "s3cr3tp4ssw0rd"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb offline, mlflow in the run folder."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def send(run_dir: Path, log: str, steps: range = range(1, 4), resume_step: int = 0, **more: Any) -> None:
    run_dir.mkdir(exist_ok=True)
    opened = open_trackers(TrackerConfig(log), run_dir, resume_step, {"seed": 1, "optim": {"lr": 0.5}, **more})
    for step in steps:
        opened.write(step, {"loss": -0.1 * step, "z_std": 0.04})
    opened.close("finished")


def records(log: bytes) -> Iterator[bytes]:
    """LevelDB's log format, after a header of 7 bytes: pieces of (crc, length, kind) in blocks of 32 KiB."""
    at, record = 7, b""
    while at + 7 <= len(log):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", log[at + 4 : at + 7])
        record += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def wandb_lines(file: Path) -> list[dict[str, Any]]:
    """The history of an offline run, out of its own file."""
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    lines = []
    for data in records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            lines.append({name: value for name, value in items.items() if not name.startswith("_")})
    return lines


def wait_for(holds: Callable[[], bool]) -> None:
    """wandb's own process writes its file, perhaps a moment after ``finish``."""
    end = time.monotonic() + 20
    while not holds() and time.monotonic() < end:
        time.sleep(0.1)


def test_wandb_offline_keeps_its_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    send(run, "wandb")
    run_id = json.loads((run / TRACKERS_FILE).read_text())["wandb"]
    time.sleep(1.1)  # wandb names its folders by the second
    send(run, "wandb", range(3, 5), resume_step=2)
    assert capsys.readouterr().err.count("warning") == 0
    files = sorted(run.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))
    wait_for(lambda: len(wandb_lines(files[1])) == 2)
    assert [[line["step"] for line in wandb_lines(file)] for file in files] == [[1, 2, 3], [3, 4]]
    assert wandb_lines(files[0])[0] == {"step": 1, "loss": -0.1, "z_std": 0.04}


def test_mlflow_in_a_folder_keeps_its_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    run = tmp_path / "run"
    send(run, "mlflow")
    send(run, "mlflow", range(4, 6), resume_step=3)
    assert capsys.readouterr().err.count("warning") == 0
    client = tracking.MlflowClient((run / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("siamstream")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == json.loads((run / TRACKERS_FILE).read_text())["mlflow"]
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    assert found.data.params == {"seed": "1", "optim.lr": "0.5"}
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(step, -0.1 * step) for step in range(1, 6)]


def test_a_run_and_its_resumed_session_report_to_the_same_runs(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    pytest.importorskip("wandb")
    places = ["--data", str(photo_dataset_path), "--run-dir", str(tmp_path / "run")]
    flags = [*places, *CPU, "--global-batch", "12", "--knn-every", "0"]
    flags += ["--log", "tensorboard,wandb,mlflow"]
    assert run_here(monkeypatch, [*flags, "--max-steps", "2"]) == 0
    ids = json.loads((tmp_path / "run" / TRACKERS_FILE).read_text())
    time.sleep(1.1)
    assert run_here(monkeypatch, [*flags, "--max-steps", "4", "--resume"]) == 0
    assert json.loads((tmp_path / "run" / TRACKERS_FILE).read_text()) == ids
    assert "gets no more metrics" not in capsys.readouterr().err
    logged = {line["step"]: line["loss"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")}
    assert sorted(logged) == [1, 2, 3, 4]
    client = tracking.MlflowClient((tmp_path / "run" / "mlruns").as_uri())
    assert {p.step: p.value for p in client.get_metric_history(ids["mlflow"], "loss")} == pytest.approx(logged)
    files = sorted((tmp_path / "run").glob(f"wandb/offline-run-*/run-{ids['wandb']}.wandb"))
    wait_for(lambda: sum(len(wandb_lines(file)) for file in files) == 4)
    lines = [line for file in files for line in wandb_lines(file)]
    assert {line["step"]: line["loss"] for line in lines} == pytest.approx(logged)
    assert list((tmp_path / "run" / "tensorboard").iterdir())


class _Run:
    """wandb's run, with the signatures that are used."""

    def __init__(self, fails_at: int) -> None:
        self.fails_at, self.rows = fails_at, list[dict[str, Any]]()

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        """As wandb's."""

    def log(self, data: dict[str, Any]) -> None:
        """As wandb's, until it fails."""
        if data["step"] >= self.fails_at:
            raise ConnectionError(f"no route to https://user:{SECRET}@host, key {SECRET}")
        self.rows.append(data)

    def finish(self, exit_code: int | None = None) -> None:
        """As wandb's."""


def fake_wandb(monkeypatch: pytest.MonkeyPatch, init: Any) -> None:
    module = types.ModuleType("wandb")
    module.init, module.Settings = init, dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)


def test_a_failing_tracker_is_left_out_with_one_warning_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    run = _Run(fails_at=3)
    fake_wandb(monkeypatch, lambda **settings: run)
    send(tmp_path / "run", "wandb,tensorboard", range(1, 8))
    said = capsys.readouterr().err
    assert said.count("warning: --log wandb gets no more metrics of this session: no route to") == said.count("\n") == 1
    assert SECRET not in said
    assert [row["step"] for row in run.rows] == [1, 2]
    assert list((tmp_path / "run" / "tensorboard").iterdir())  # the others go on


@pytest.mark.parametrize("error", [ValueError("no account"), SystemExit(1), OSError(28, "No space left on device")])
def test_one_that_cannot_be_opened_is_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    def init(**settings: Any) -> None:
        raise error

    fake_wandb(monkeypatch, init)
    send(tmp_path / "run", "wandb")
    assert capsys.readouterr().err.count("warning: --log wandb") == 1
    assert not (tmp_path / "run" / TRACKERS_FILE).exists()


def test_tensorboard_that_fails_does_not_stop_training_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("a file in the folder's place")
    send(tmp_path / "run", "tensorboard")
    assert capsys.readouterr().err.count("warning: --log tensorboard") == 1


def test_one_that_hangs_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    go_on = threading.Event()
    fake_wandb(monkeypatch, lambda **settings: go_on.wait())
    monkeypatch.setattr(trackers, "CLOSE_S", 0.1)
    begin = time.perf_counter()
    send(tmp_path / "run", "wandb", range(1, 1000))
    assert time.perf_counter() - begin < 10
    assert "has not taken all lines within 0 s" in capsys.readouterr().err
    monkeypatch.setattr(trackers, "LINES_WAITING", 5)
    send(tmp_path / "run", "wandb", range(1, 1000))
    said = capsys.readouterr().err
    assert "is 5 lines behind" in said
    assert said.count("warning") == 1
    go_on.set()


def test_a_damaged_list_of_ids_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / TRACKERS_FILE).write_text("[1]")
    send(tmp_path / "run", "mlflow")
    assert f"{TRACKERS_FILE} holds no ids of runs: delete it to begin new ones" in capsys.readouterr().err


def test_no_file_of_a_run_holds_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    monkeypatch.setenv("WANDB_API_KEY", SECRET * 4)
    data = conceal(f"https://me:{SECRET}@host/data")  # as the command line does
    config = parse_config(["--data", data, "--run-dir", str(tmp_path / "run"), "--method", "simsiam"])
    (tmp_path / "run").mkdir()
    opened = open_trackers(TrackerConfig("tensorboard,wandb,mlflow"), tmp_path / "run", 0, config.as_json())
    opened.write(1, {"loss": 1.0})
    opened.close("finished")
    assert "warning" not in capsys.readouterr().err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--log", "comet"], "--log comet: it takes tensorboard, wandb, mlflow, separated by commas, or none"),
        (["--log", "wandb,"], "--log wandb,: it takes tensorboard"),
        (["--log", ""], "--log : it takes tensorboard"),
        (["--log", "wandb,wandb"], "it names each tracker once"),
        (["--log", "none,wandb"], "it takes tensorboard"),
        (["--log-project", " "], "--log-project ' ': it takes a name"),
    ],
)
def test_mistakes(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("|", r"\|")):
        parse_config(["--data", "d", "--run-dir", "r", *flags])


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    config = PretrainConfig(data=Path("d"), run_dir=Path("r"), trackers=TrackerConfig("mlflow, wandb"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"mlflow is not installed: pip install 'siamstream\[mlflow\]'"):
        config.trackers.check_installed()
    assert TrackerConfig("none").names == ()
