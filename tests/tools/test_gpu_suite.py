"""The GPU suite at toy size on a CPU: every part measures, a failing one is recorded and costs no other."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from pipeline.common.errors import UserError
from pipeline.dataset.dataset import ShardSet
from tests.helpers.toy_runs import call
from train.engine import loop as loop_module

BENCHMARKS = str(Path(__file__).resolve().parents[2] / "benchmarks")
sys.path.insert(0, BENCHMARKS)  # scripts there find each other as neighbours

import gpu_bench  # noqa: E402
import gpu_parts  # noqa: E402
import gpu_roofline  # noqa: E402
import gpu_smoke  # noqa: E402
import gpu_steps  # noqa: E402
import gpu_suite  # noqa: E402
from gpu_report import markdown  # noqa: E402

QUICK = ("parity", "stages", "decode", "official", "model")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    return call(monkeypatch, gpu_suite, *arguments)


def test_every_part_measures_and_reports(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [str(photo_dataset_path), "--out", str(tmp_path), "--toy", "--no-isolate", "--minutes", "30"]
    assert run(monkeypatch, *arguments, "--parts", *QUICK) == 0
    results = json.loads((tmp_path / "suite.json").read_text())
    parts = results["parts"]
    assert tuple(parts) == QUICK
    assert results["failures"] == {}
    assert parts["parity"]["whole recipe"]["mean"] < 0.5
    assert set(parts["stages"]["stages"]) == {
        *("read", "decode", "crops", "photometric", "loader", "model", "end_to_end"),
    }
    assert parts["stages"]["verdict"]["gpu_bound"] > 0
    assert (tmp_path / "stages.png").stat().st_size > 10_000
    measured = [value for name in QUICK[2:] for value in parts[name].values() if "img_per_s" in value]
    assert len(measured) >= 5
    assert all(value["img_per_s"]["minimum"] > 0 and value["img_per_s"]["runs"] == 3 for value in measured)
    text = (tmp_path / "suite.md").read_text()
    for heading in ("Parity", "The stages, eager", "The official recipe", "limiter", "toy size"):
        assert heading in text
    assert "needs a GPU" in text  # Apex
    steps = [parts["stages"], *parts["official"].values(), *(v for v in parts["model"].values() if "img_per_s" in v)]
    assert all(step["roofline"]["most_img_per_s"] > 0 for step in steps)
    rows = [line.split(" | ") for line in text.splitlines() if re.match(r"\| [^|]* \| [\d.e+]+ \(", line)]
    assert len(rows) >= 12  # a stage, a placement, the official recipe, or a variant of the step
    for row in rows:  # the roofline beside each rate of a step, and nothing of a GPU's
        stage = row[0].removeprefix("| ")
        of_a_step = stage in ("model step alone", "end to end", "official, end to end") or stage.startswith("batch")
        assert re.fullmatch(r"[\d,.e+]+, \d+%" if of_a_step else "no step", row[2]), row
        assert row[4:6] == ["needs a GPU", "needs a GPU"]
    assert "gpu_bound needs a GPU" in text
    for name in ("mixed, hardware load 0.65", "mixed, 4000 px set aside", "crop and flip alone, CPU"):
        assert f"| {name} | needs a GPU |" in text


def test_all_parts_fit_into_the_suites_time() -> None:
    assert sum(part.seconds for part in gpu_parts.PARTS.values()) <= 60 * gpu_suite.Config.minutes
    session = SESSION.read_text()
    limit = re.search(r"step suite (\d+) ", session)
    assert limit is not None
    assert 60 * gpu_suite.Config.minutes + gpu_suite.GRACE_S <= int(limit[1]) < 600


def test_the_checks_come_in_order_and_fit_into_ten_minutes(tmp_path: Path) -> None:
    """With a Python and an nvidia-smi that do nothing: what the script runs, and how long it lets it."""
    for name in ("python", "nvidia-smi"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 0\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PYTHON": str(tmp_path / "python"), "PATH": path, "TOY": ""}
    for slower in (1, 2):
        out = tmp_path / f"out-{slower}"
        command = ["bash", str(SESSION), "check", str(out)]
        subprocess.run(
            command, capture_output=True, check=False, env={**environment, "LIMITS": str(slower)}, timeout=120
        )
        lines = re.findall(r"== ([\w-]+): done, \d+ of (\d+) s", (out / "session.txt").read_text())
        assert [name for name, _ in lines if name != "synthetic"] == [
            *("machine", "smoke", "hardware", "tests", "launches", "two-ranks", "one-rank", "two-ranks-compiled"),
        ]
        limits = {name: int(limit) for name, limit in lines}
        assert sum(limits.values()) <= 590 * slower
        assert limits["machine"] + limits["smoke"] == 240 * slower  # a cold start


def test_a_session_that_is_killed_leaves_a_tar_of_the_steps_that_were_done(tmp_path: Path) -> None:
    """With a Python that begins, and then hangs."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *one-rank*) touch {tmp_path}/begun; sleep 300;; esac\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "TOY": "1"}
    command = ["bash", str(SESSION), "ranks", str(tmp_path / "out")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True) as session:
        for _ in range(600):
            if (tmp_path / "begun").exists():
                break
            time.sleep(0.1)
        os.killpg(session.pid, signal.SIGKILL)
    with tarfile.open(tmp_path / "out.tar") as tar:
        assert {"out/session.txt", "out/two-ranks.log"} <= set(tar.getnames())
        session_txt = tar.extractfile("out/session.txt")
        assert session_txt is not None
        assert b"two-ranks: done" in session_txt.read()


def test_the_hosts_share_of_a_step_is_measured(photo_dataset_path: Path, tmp_path: Path) -> None:
    with toy_suite(photo_dataset_path, tmp_path, 60) as suite:
        gpu_parts.EVERY_PART["launches"].work(suite)
        assert suite.failures == []
    part = json.loads((tmp_path / "part-trial.json").read_text())
    assert list(part) == ["batch 4, fp32, eager", "batch 2, fp32, eager"]
    for step in part.values():
        assert step["launches"] > 500  # operations of forward, backward and optimizer
        assert 0 < step["host_ms"] <= step["step_ms"]
        assert step["kernels_ms"] > 0
    text = markdown({"toy": True, "machine": {}, "failures": {}, "parts": {"launches": part}})
    assert "| | launches | host_ms | step_ms | kernels_ms |" in text
    row = next(line for line in text.splitlines() if line.startswith("| batch 4"))
    assert re.search(
        r"eager \| needs a GPU \| needs a GPU \| [\d.]+ \| needs a GPU \| [\d.,]+ \| [\d.,]+, \d+% \|", row
    )
    real = markdown({"toy": False, "machine": {}, "failures": {}, "parts": {"launches": part}})
    assert "needs a GPU" not in real
    assert f"| {part['batch 4, fp32, eager']['launches']:,.4g} |" in real


def test_whole_runs_are_compared_with_a_graph_and_without(photo_dataset_path: Path, tmp_path: Path) -> None:
    with toy_suite(photo_dataset_path, tmp_path, 300) as suite:
        gpu_parts.PARTS["cuda-graph"].work(suite)
        assert suite.failures == []
    part = json.loads((tmp_path / "part-trial.json").read_text())
    assert list(part) == ["batch 2, --no-cuda-graph", "batch 2, --cuda-graph"]
    assert all(run["img_per_s"] > 0 and run["host_bound"] == 0 for run in part.values())
    assert all(run["roofline"] is None for run in part.values())  # the part roofline did not run
    limits = {"most_img_per_s": 2 * part["batch 2, --no-cuda-graph"]["img_per_s"]}
    counted = {name: {**run, "roofline": limits} for name, run in part.items()}
    text = markdown({"toy": True, "machine": {}, "failures": {}, "parts": {"cuda-graph": counted}})
    assert re.search(r"\| batch 2, --no-cuda-graph \| [\d.,]+ \| needs a GPU \| \S+ \| [\d.,]+, 50% \|", text)
    assert "| batch 2, --cuda-graph | needs a GPU |" in text  # a CPU's run made ordinary steps
    part["batch 2, --cuda-graph"] = {"failed": "RuntimeError: no"}
    text = markdown({"toy": True, "machine": {}, "failures": {}, "parts": {"cuda-graph": part}})
    assert "| batch 2, --cuda-graph | failed: RuntimeError: no |  |  |" in text


def test_the_roofline_counts_the_steps_bytes_and_flops(photo_dataset_path: Path, tmp_path: Path) -> None:
    with toy_suite(photo_dataset_path, tmp_path, 60) as suite:
        gpu_parts.PARTS["roofline"].work(suite)
        assert suite.failures == []
    part = json.loads((tmp_path / "part-trial.json").read_text())
    small, large = part["batch 4"], part["batch 8"]
    assert large["step_tflop"] == pytest.approx(2 * small["step_tflop"], rel=0.01)  # the model's work alone
    assert small["step_gb"] < large["step_gb"] < 2 * small["step_gb"]  # weights are moved once
    assert large["most_img_per_s"] == pytest.approx(8e3 / max(large["bytes_ms"], large["flops_ms"]))
    text = markdown({"toy": True, "machine": {}, "failures": {}, "parts": {"roofline": part}})
    assert "| batch 8 |" in text
    assert "| batch 2 |" in text  # of the runs with a CUDA graph
    assert re.search(r"matmul in TFLOP/s: bf16 [\d.e-]+, fp32 [\d.e-]+\.", text)
    with toy_suite(photo_dataset_path, tmp_path, 60) as suite:
        assert gpu_roofline.known(suite, "batch 2") is None
        (tmp_path / "part-trial.json").rename(tmp_path / "part-roofline.json")
        assert gpu_roofline.known(suite, "batch 2") == part["batch 2"]
        assert gpu_roofline.known(suite, "batch 3") is None


def test_no_measurement_begins_that_would_not_end_in_time(photo_dataset_path: Path, tmp_path: Path) -> None:
    """A part that is stopped counts as failed; one that leaves out its last measurements does not."""
    with toy_suite(photo_dataset_path, tmp_path, 60) as suite:
        suite.attempt("first, a cold start", lambda: time.sleep(1.5))
        suite.end_s = time.perf_counter() + 1.2
        suite.attempt("second", lambda: time.sleep(0.7))
        suite.attempt("third", lambda: time.sleep(0.7))
    assert list(suite.results) == ["first, a cold start", "second", "third"]
    assert suite.results["second"] is None
    assert "were not left" in suite.results["third"]["skipped"]
    assert suite.failures == []


def test_bytes_are_inputs_and_outputs_but_of_views() -> None:
    x = torch.zeros(10, 10)
    with gpu_roofline.BytesMoved() as moved:
        x.t().add(x)
    assert moved.total == 3 * 400


def test_a_part_that_fails_costs_no_other(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(suite: gpu_bench.Suite) -> None:
        suite.attempt("first", lambda: {"mean": 1.0, "p99": 1.0, "max": 1.0, "within_4": 1.0})
        suite.attempt("second", lambda: 1 / 0)
        suite.attempt("third", lambda: [][0], needs_s=10_000)

    monkeypatch.setitem(gpu_parts.PARTS, "parity", gpu_parts.Part(broken, 30))
    arguments = [str(photo_dataset_path), "--out", str(tmp_path), "--toy", "--no-isolate"]
    assert run(monkeypatch, *arguments, "--parts", "parity", "decode") == 1
    results = json.loads((tmp_path / "suite.json").read_text())
    assert "ZeroDivisionError" in results["failures"]["parity"]
    assert results["parts"]["parity"]["first"]["mean"] == 1.0
    assert "failed" in results["parts"]["parity"]["second"]
    assert "skipped" in results["parts"]["parity"]["third"]
    assert "img_per_s" in results["parts"]["decode"]["CPU"]
    assert "1 parts failed" in capsys.readouterr().err


def test_a_part_in_a_process_of_its_own_is_stopped_in_time(photo_dataset_path: Path, tmp_path: Path) -> None:
    config = gpu_suite.Config(photo_dataset_path, tmp_path, toy=True)
    failure = gpu_suite.start_part(config, "parity", seconds=0.2 - gpu_suite.GRACE_S)
    assert failure is not None
    assert failure.startswith("stopped after")


def test_a_part_in_a_process_of_its_own_leaves_its_numbers(photo_dataset_path: Path, tmp_path: Path) -> None:
    config = gpu_suite.Config(photo_dataset_path, tmp_path, toy=True)
    # Compiled: in this process Dynamo would trace the checks of shapes and types that only tests have.
    assert gpu_suite.start_part(config, "compiled", seconds=400) is None
    (step,) = json.loads((tmp_path / "part-compiled.json").read_text()).values()
    assert step["img_per_s"]["runs"] == 3
    failure = gpu_suite.start_part(config, "no-such-part", seconds=60)
    assert failure is not None
    assert "no-such-part" in failure


def test_what_cannot_be_run_is_refused(photo_dataset_path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--parts espresso: there are parity"):
        gpu_suite.check(gpu_suite.Config(photo_dataset_path, tmp_path, parts=("espresso",)))
    samples = ShardSet.open(photo_dataset_path).num_samples
    with pytest.raises(UserError, match=f"{samples} samples, too few to measure batches of 512"):
        gpu_suite.check(gpu_suite.Config(photo_dataset_path, tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"):
        gpu_suite.check(gpu_suite.Config(photo_dataset_path, tmp_path / "file" / "out", toy=True))


def toy_suite(data: Path, out: Path, seconds: float) -> AbstractContextManager[gpu_bench.Suite]:
    return gpu_bench.Suite.open(data, out, True, "trial", time.perf_counter() + seconds)


def test_plain_sgd_is_what_the_steps_take(photo_dataset_path: Path, tmp_path: Path) -> None:
    """The guard makes the steps, so it has to know of the optimizer that took the place of the run's own."""
    with toy_suite(photo_dataset_path, tmp_path, 60) as suite:
        bench, run = suite.set_up(4, optimizer="foreach")
        plain = gpu_steps.with_plain_sgd(run, foreach=False)
        loop_module.train_step(plain, iter(bench.resident_views()))
    assert len(plain.optimizer.state) > 10
    assert not run.optimizer.state


def test_contiguous_weights_have_contiguous_momentum(photo_dataset_path: Path, tmp_path: Path) -> None:
    with toy_suite(photo_dataset_path, tmp_path, 60) as suite:
        _, run = suite.set_up(4, optimizer="fused")
        gpu_steps.make_contiguous(run)
    filters = [weight for weight in run.optimizer.state if weight.dim() == 4]
    assert filters
    for weight in filters:
        assert weight.is_contiguous()
        assert run.optimizer.state[weight]["momentum_buffer"].stride() == weight.stride()


def test_a_part_without_time_left_measures_each_stage_once(photo_dataset_path: Path, tmp_path: Path) -> None:
    with toy_suite(photo_dataset_path, tmp_path, 0) as suite:
        gpu_parts.decode(suite)
    assert json.loads((tmp_path / "part-trial.json").read_text())["CPU"]["img_per_s"]["runs"] == 1


def test_what_a_part_knows_is_written_before_it_ends(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that is stopped in the middle of its trials keeps the trials that it has."""

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_parts, "judge", stopped)
    with toy_suite(photo_dataset_path, tmp_path, 0) as suite, pytest.raises(KeyboardInterrupt):
        gpu_parts.stages(suite)
    stages = json.loads((tmp_path / "part-trial.json").read_text())["stages"]
    assert set(stages) >= {"model", "end_to_end", "loader"}
    whole = {"toy": True, "machine": {}, "failures": {}, "parts": {"stages": {"stages": stages}}}
    assert "| model step alone |" in markdown(whole)


def test_the_report_says_what_was_skipped_or_failed() -> None:
    part = {"a": {"skipped": "out of GPU memory"}, "b": {"failed": "RuntimeError: no"}}
    text = markdown({"toy": False, "machine": {}, "failures": {"model": "exit code 1: no"}, "parts": {"model": part}})
    assert "| a | out of GPU memory |" in text
    assert "| b | failed: RuntimeError: no |" in text
    assert "- model: exit code 1: no" in text


SESSION = Path(__file__).resolve().parents[2] / "scripts" / "gpu_session.sh"


def test_the_session_names_what_it_needs() -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", SESSION, "--needs"], capture_output=True, text=True, check=True, env=environment, timeout=120
    )
    names = {line.partition("==")[0] for line in done.stdout.splitlines()}
    assert {"tyro", "docstring-parser", "webdataset", "braceexpand", "pytest", "beartype"} <= names
    assert not names & {"torch", "torchvision", "triton"}
    if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"):
        assert {"nvidia-dali-cuda130", "nvidia-nvjpeg", "gast"} <= names  # what DALI needs in its trial


@pytest.mark.parametrize("arguments", [[], ["check"], ["espresso", "OUT"], ["a", "b", "c", "d", "e"]])
def test_a_session_that_makes_no_sense_is_refused(arguments: list[str], tmp_path: Path) -> None:
    words = [str(tmp_path) if word == "OUT" else word for word in arguments]
    done = subprocess.run(["bash", SESSION, *words], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "scripts/gpu_session.sh check OUT" in done.stderr


def test_a_session_without_data_draws_its_own(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "TOY": "1", "LIMITS": "2"}
    command = ["bash", str(SESSION), "smoke", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.partition(",")[0] for line in (tmp_path / "session.txt").read_text().splitlines()] == [
        "== synthetic: done",
        "== smoke: done",
    ]


def test_the_smoke_test_says_what_failed(
    photo_dataset_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_smoke.Smoke, "waits", lambda smoke: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["gpu_smoke.py", str(photo_dataset_path), "--toy"])
    with pytest.raises(SystemExit) as end:
        gpu_smoke.main()
    assert end.value.code == 1
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == "failed: a step without a wait"
    for line in ("DALI, CPU: mean", "photometric stage: mean", "training steps: losses", "a step with a nan: skipped"):
        assert line in said.out
