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
