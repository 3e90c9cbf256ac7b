"""Reports: one line a step whatever happens, rates that leave out pauses, an alarm that is neither deaf nor nervous."""

from __future__ import annotations

import io
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.common.errors import UserError
from pipeline.common.files import write_json
from pipeline.common.system import duration
from tests.helpers import toy_runs
from train import pretrain
from train.distributed.collectives import HostCopy
from train.engine import loop
from train.monitoring.metrics import MetricsLog
from train.monitoring.progress import GpuProgress, ProgressLine, RateMeter, Rates
from train.storage.run_folder import METRICS_FILE, cut_off, read_lines


def steps(path: Path) -> list[int]:
    return [line["step"] for line in read_lines(path)]


def test_lines_survive_and_resuming_cuts_off_what_comes_again(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.write(0, 0, knn_top1=10.0)
    for step in range(1, 6):
        log.write(0, step, loss=-0.1 * step, z_std=0.02)
    log.write(1, 5, knn_top1=20.0)
    log.close()
    path = tmp_path / METRICS_FILE
    assert steps(path) == [0, 1, 2, 3, 4, 5, 5]
    second = read_lines(path)[1]
    assert abs(second.pop("time") - time.time()) < 600
    assert second == {"epoch": 0, "step": 1, "loss": -0.1, "z_std": 0.02}

    with path.open("a") as file:
        file.write('{"epoch": 1, "st')  # a line that a killed run left half-written
    log = MetricsLog(tmp_path, 3)
    assert log.knn == {0: 10.0}
    assert log.newest() == {"loss": -0.1 * 3, "z_std": 0.02, "knn_top1": 10.0, "knn_top1_untrained": 10.0}
    log.write(0, 4, loss=-7.0)
    log.close()
    assert steps(path) == [0, 1, 2, 3, 4]


def test_a_whole_number_of_bits_comes_back(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.write(0, 1, loss=-0.12345679104328156)
    log.close()
    assert read_lines(tmp_path / METRICS_FILE)[0]["loss"] == -0.12345679104328156


def strict(text: str) -> Any:
    """As parsers read it that know no nan."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_null_on_disk_and_nan_when_read(tmp_path: Path, value: float) -> None:
    path = tmp_path / METRICS_FILE
    log = MetricsLog(tmp_path, 0)
    log.write(0, 1, loss=value, lr=0.1)
    write_json(tmp_path / "summary.json", log.newest())
    log.close()
    MetricsLog(tmp_path, 1).close()  # a resumed run writes the lines that stay again
    written = strict(path.read_text())
    assert abs(written.pop("time") - time.time()) < 600
    assert written == {"epoch": 0, "step": 1, "loss": None, "lr": 0.1}
    assert strict((tmp_path / "summary.json").read_text()) == {"loss": None, "lr": 0.1}
    (line,) = read_lines(path)
    assert math.isnan(line["loss"])
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    (shown,) = board.Scalars("loss")
    assert str(shown.value) == str(value)


def test_cut_off_without_a_file(tmp_path: Path) -> None:
    assert cut_off(tmp_path / "none.jsonl", 3) == []
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log._file.close()
    log._file = open("/dev/full", "a", buffering=1)  # noqa: SIM115  # every write fails with "no space left"
    with pytest.raises(UserError, match=r"metrics.jsonl failed: No space left.*free some space"):
        log.write(0, 1, loss=0.0)


def test_rates() -> None:
    now = [0.0]
    meter = RateMeter(clock=lambda: now[0])
    now[0] = 1.0
    meter.step(64, wait_s=0.5)
    now[0] = 2.0
    meter.step(64, wait_s=0.0)
    assert meter.read() == Rates(img_per_s=64.0, data_wait=0.25, step_s=1.0)
    now[0] = 100.0
    meter.restart()  # after an evaluation
    now[0] = 100.5
    meter.step(64, wait_s=0.0)
    assert meter.read() == Rates(img_per_s=128.0, data_wait=0.0, step_s=0.5)


def test_plain_progress_lines_are_rare_and_the_last_one_is_shown() -> None:
    now, stream = [0.0], io.StringIO()
    line = ProgressLine(100, stream, clock=lambda: now[0])
    for step in range(1, 101):
        now[0] += 1.0
        line.show(0, step, -0.5, 0.02, Rates(1000.0, 0.25, 2.0))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[0] == "epoch 0 step 1/100 loss -0.5000 z_std 0.0200 1000 img/s data_wait 25% left 3 min 18 s"
    assert "step 100/100" in lines[-1]


def test_durations() -> None:
    texts = [duration(s) for s in (41.2, 200, 5 * 3600 + 120, 3 * 86400 + 4 * 3600)]
    assert texts == ["41 s", "3 min 20 s", "5 h 02 min", "3 d 04 h"]


class FakeStream:
    """A GPU's queue that is done or not, as the test says."""

    done = False

    def record_event(self) -> FakeStream:
        return self

    def query(self) -> bool:
        return self.done


@pytest.mark.parametrize("ahead", [True, False])
def test_a_host_that_keeps_a_gpu_waiting_is_counted(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = FakeStream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    progress, meter = GpuProgress(torch.device("cuda")), RateMeter(clock=iter((0.0, 4.0, 4.0)).__next__)
    for number in range(4):
        progress.backward_launched()
        stream.done = not ahead and number > 0  # while the host launches the optimizer
        meter.step(64, 0.0, progress.caught_up())
    rates = meter.read()
    assert rates.host_bound == (0.0 if ahead else 0.75)
    stderr = io.StringIO()
    ProgressLine(10, stderr).show(0, 1, 0.0, 0.0, rates)
    assert ("host_bound 75%" in stderr.getvalue()) == (not ahead)


def test_a_cpu_has_no_queue() -> None:
    progress = GpuProgress(torch.device("cpu"))
    progress.backward_launched()
    assert not progress.caught_up()


# Lines whose numbers come from the device some steps later.


@pytest.fixture(scope="module")
def lines_of_lag(photo_dataset_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """metrics.jsonl of the same run, read at once and two steps late."""
    found = {}
    for lag in (0, 2):
        run_dir = tmp_path_factory.mktemp("lag") / "run"
        where = ["--data", str(photo_dataset_path), "--run-dir", str(run_dir), "--backend", "torchvision"]
        steps = ["--global-batch", "12", "--epochs", "3", "--max-steps", "11", "--log-every", "2", "--knn-every", "1"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("train.monitoring.reporter.default_lag", lambda dist, lag=lag: lag)
            more = ["--checkpoint-every", "3steps"]
            assert toy_runs.call(patch, pretrain, *where, *toy_runs.TINY, *toy_runs.CPU, *steps, *more) == 0
        found[lag] = read_lines(run_dir / METRICS_FILE)
    return found


def test_late_lines_are_the_same_lines_in_the_same_order(lines_of_lag: dict[int, list[dict[str, Any]]]) -> None:
    """At kNN and checkpoints, too, and the last step's is not lost."""
    timed = {"time", "img_per_s", "step_s", "data_wait"}
    at_once, late = (
        [{k: v for k, v in line.items() if k not in timed} for line in lines_of_lag[lag]] for lag in (0, 2)
    )
    assert late == at_once
    assert [line["step"] for line in late if "loss" in line] == [1, 2, 4, 6, 8, 10, 11]


class Delayed(HostCopy):
    """Numbers that an event of the device brings: those of a step are there when the next but one is done."""

    steps_done = 0
    reads: list[tuple[int, int]] = []  # noqa: RUF012  # (step whose numbers they are, steps done when they are read)

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__(values.clone())
        self._step = Delayed.steps_done + 1

    def is_here(self) -> bool:
        return Delayed.steps_done >= self._step + 1

    def read(self) -> list[Any]:
        Delayed.reads.append((self._step, Delayed.steps_done + 1))
        return super().read()


@pytest.mark.parametrize("ends_by", ["itself", "an error"])
def test_numbers_are_read_two_steps_late_and_at_the_end(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends_by: str
) -> None:
    step = loop.train_step

    def counted(run: Any, batches: Any) -> Any:
        result = step(run, batches)
        Delayed.steps_done = run.step
        if ends_by == "an error" and run.step == 5:
            raise UserError("the sixth step fails")
        return result

    monkeypatch.setattr("train.monitoring.reporter.default_lag", lambda dist: 2)
    monkeypatch.setattr("train.monitoring.reporter.HostCopy", Delayed)
    monkeypatch.setattr(loop, "train_step", counted)
    monkeypatch.setattr(Delayed, "reads", [])
    where = ["--data", str(photo_dataset_path), "--run-dir", str(tmp_path / "run"), "--backend", "torchvision"]
    steps = ["--global-batch", "12", "--epochs", "3", "--max-steps", "7", "--log-every", "1", "--knn-every", "0"]
    more = ["--checkpoint-every", "100steps"]
    code = toy_runs.call(monkeypatch, pretrain, *where, *toy_runs.TINY, *toy_runs.CPU, *steps, *more)
    written = [line["step"] for line in read_lines(tmp_path / "run" / METRICS_FILE) if "loss" in line]
    if ends_by == "itself":
        assert code == 0
        assert Delayed.reads == [(1, 3), (2, 4), (3, 5), (4, 6), (5, 7), (6, 7), (7, 7)]
        assert written == list(range(1, 8))
    else:  # after an error nothing is waited for: the device may have hung
        assert code == 2
        assert Delayed.reads == [(1, 3), (2, 4), (3, 5), (4, 6)]
        assert written == [1, 2, 3, 4]


def test_the_rank_is_computed_every_hundred_steps_and_with_each_line_while_it_is_low(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.monitoring.reporter.RANK_EVERY", 4)
    ranks = iter([5.0, 6.0, 1.0, 1.0, 7.0, 8.0, 9.0])
    computed: list[float] = []

    def rank(z: torch.Tensor) -> torch.Tensor:
        computed.append(next(ranks))
        return torch.tensor(computed[-1])

    monkeypatch.setattr("train.monitoring.reporter.effective_rank", rank)
    monkeypatch.setattr("train.monitoring.collapse.RANK", 4.0)
    monkeypatch.setattr("train.monitoring.collapse.RANK_SHARE", 1.0)
    where = ["--data", str(photo_dataset_path), "--run-dir", str(tmp_path / "run"), "--backend", "torchvision"]
    steps = ["--global-batch", "12", "--epochs", "4", "--max-steps", "14", "--log-every", "1", "--knn-every", "0"]
    assert toy_runs.call(monkeypatch, pretrain, *where, *toy_runs.TINY, *toy_runs.CPU, *steps) == 0
    shown = [line["z_rank"] for line in read_lines(tmp_path / "run" / METRICS_FILE)]
    # Steps 1 and 4; 8, where it is low, so 9 and 10 as well; 12; and 14, the last.
    assert shown == [5.0] * 3 + [6.0] * 4 + [1.0] * 2 + [7.0] * 2 + [8.0] * 2 + [9.0]
