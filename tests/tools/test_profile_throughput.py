"""profile_throughput.py: every stage runs, the verdict follows from the numbers, mistakes end with code 2."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.backends.base import DaliConfig
from pipeline.loader.config import LoaderConfig
from tests.helpers.toy_runs import TINY, call
from tools import profile_throughput
from tools.common import gpu_monitor
from tools.common.fake_imagenet import draw_jpeg, write_images
from tools.common.gpu_monitor import GpuMonitor, busy_with_others
from tools.throughput import tune as tuning
from tools.throughput import workload as workload_module
from tools.throughput.report import Setting, StageResult, describe, draw_stages, judge, table
from tools.throughput.timing import StageRunner, Trial
from tools.throughput.tune import PRESENT, candidates, choose
from train.config.recipes import parse_config

SHORT = [*TINY, "--batch", "8", "--seconds", "0.02", "--threads", "1"]
ON_CPU = Setting(on_gpu=False, decoder="mixed", cores=2, precision="fp32", compiled=False)
ON_GPU = Setting(on_gpu=True, decoder="mixed", cores=16, precision="bf16", compiled=False)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    return call(monkeypatch, profile_throughput, *arguments)


def test_all_stages(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {flag: tmp_path / name for flag, name in (("json", "l.json"), ("plot", "l.png"), ("trace", "t.json"))}
    wanted = [word for flag, path in files.items() for word in (f"--{flag}", str(path))]
    arguments = ["--data", str(photo_dataset_path), *SHORT, "--device", "cpu", "--repeats", "3"]
    assert run(monkeypatch, *arguments, *wanted) == 0
    printed = capsys.readouterr().out
    for words in ("read bytes", "photometric stage", "forward", "optimizer", "data_wait", "gpu_bound = ", "limiter: "):
        assert words in printed
    numbers = json.loads(files["json"].read_text())
    assert set(numbers["stages"]) == set(workload_module.STAGES)
    for stage in numbers["stages"].values():
        assert stage["img_per_s"]["runs"] == 3
        assert 0 < stage["img_per_s"]["minimum"] <= stage["img_per_s"]["median"] <= stage["img_per_s"]["maximum"]
        assert stage["cores"]["median"] > 0
    parts = numbers["stages"]["model"]["parts"]
    whole = 1 / numbers["stages"]["model"]["img_per_s"]["median"]
    assert 0.3 * whole < sum(parts.values()) < 1.7 * whole
    assert numbers["verdict"]["gpu_bound"] > 0
    assert "machine" in numbers
    Image.open(files["plot"]).verify()
    assert json.loads(files["trace"].read_text())["traceEvents"]


def test_the_stages_of_the_torchvision_back_end(
    photo_dataset_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = ["--rungs", "decode", "crops", "photometric", "loader"]  # the former name of --stages
    arguments = ["--data", str(photo_dataset_path), *SHORT, "--device", "cpu", "--repeats", "3", *stages]
    assert run(monkeypatch, *arguments, "--backend", "torchvision") == 0
    printed = capsys.readouterr().out
    assert "the model was not measured" in printed
    assert "read bytes" not in printed


def trial(rate: float, cores: float = 1.0, **parts: float) -> Trial:
    return Trial(images=1000, wall_s=1000 / rate, cpu_s=cores * 1000 / rate, parts=parts, gpu=None)


def verdict_of(setting: Setting, **rates: float) -> Any:
    trials = {name: [trial(rate * noise) for noise in (0.99, 1.0, 1.01)] for name, rate in rates.items()}
    return judge({name: StageResult.of(of) for name, of in trials.items()}, trials, setting)


PARTS = {"read": 9000.0, "decode": 3000.0, "crops": 5000.0, "photometric": 8000.0}


@pytest.mark.parametrize(
    ("rates", "setting", "limiter", "advice"),
    [
        ({**PARTS, "loader": 2500, "model": 1000, "end_to_end": 990}, ON_GPU, "model", "--compile"),
        ({**PARTS, "loader": 900, "model": 2000, "end_to_end": 890}, ON_GPU, "decode", "--tune"),
        (
            {**PARTS, "read": 800, "loader": 790, "model": 2000, "end_to_end": 780},
            ON_GPU,
            "read",
            "faster or a local disk",
        ),
        ({**PARTS, "crops": 500, "loader": 450, "model": 2000, "end_to_end": 440}, ON_CPU, "crops", "--threads"),
        (
            {**PARTS, "photometric": 500, "loader": 450, "model": 2000, "end_to_end": 440},
            ON_CPU,
            "photometric",
            "--blur",
        ),
        ({**PARTS, "loader": 2500, "model": 2000, "end_to_end": 1500}, ON_GPU, "sharing", "--dali.decoder cpu"),
        ({**PARTS, "loader": 2500, "model": 2000, "end_to_end": 1500}, ON_CPU, "sharing", "share the cores"),
        (PARTS, ON_GPU, "decode", "--tune"),
        ({"model": 100.0}, ON_GPU, "unknown", ""),
        ({"model": 100.0, "end_to_end": 50.0}, ON_GPU, "unknown", ""),
    ],
)
def test_the_limiter_follows_from_the_numbers(
    rates: dict[str, float], setting: Setting, limiter: str, advice: str
) -> None:
    verdict = verdict_of(setting, **rates)
    assert verdict.limiter == limiter
    assert advice in describe(verdict)
    if "model" in rates and "end_to_end" in rates:
        assert verdict.gpu_bound == pytest.approx(rates["end_to_end"] / rates["model"])


def test_gpu_bound_compares_round_by_round() -> None:
    """A machine that slows down half-way slows both down: their ratio stays."""
    trials = {
        name: [trial(rate * pace) for pace in (1.0, 0.5, 0.25)] for name, rate in (("model", 100), ("end_to_end", 98))
    }
    verdict = judge({name: StageResult.of(of) for name, of in trials.items()}, trials, ON_GPU)
    assert verdict.gpu_bound_spread is not None
    assert verdict.gpu_bound_spread.minimum == pytest.approx(verdict.gpu_bound_spread.maximum) == pytest.approx(0.98)
    assert verdict.limiter == "model"


@pytest.mark.parametrize(("host_s", "limiter"), [(0.0095, "host"), (0.002, "model")])
def test_a_host_that_cannot_launch_fast_enough_is_the_limiter(host_s: float, limiter: str) -> None:
    """100 images a second: 0.01 s an image. Seconds of a part are those of the whole trial."""
    alone = trial(100)
    trials = {"model": [trial(100, host=host_s * alone.images)] * 3, "end_to_end": [trial(99)] * 3}
    verdict = judge({name: StageResult.of(of) for name, of in trials.items()}, trials, ON_GPU)
    assert verdict.limiter == limiter
    assert ("95% of a step's time to launch it" in describe(verdict)) == (limiter == "host")


def test_busy_cores_change_the_advice() -> None:
    trials = {name: [trial(rate, cores=15.5)] * 3 for name, rate in (("decode", 10.0), ("loader", 9.0))}
    results = {name: StageResult.of(of) for name, of in trials.items()}
    assert "all 16 cores are busy" in describe(judge(results, trials, ON_GPU))


def test_the_plot_marks_the_limiter_and_shows_the_gpu() -> None:
    trials = {name: [trial(rate)] * 3 for name, rate in {**PARTS, "loader": 900.0}.items()}
    trials["model"] = [trial(2000, forward=0.2, backward=0.25, optimizer=0.05)] * 3
    trials["end_to_end"] = [trial(890, data_wait=0.6)] * 3
    results = {name: StageResult.of(of) for name, of in trials.items()}
    figure = draw_stages(results, judge(results, trials, ON_GPU), "a test")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert "»" in texts  # a bar that was broken off
    assert any(text.startswith("890") for text in texts)
    assert "decode" in figure.get_suptitle()
    assert "of the time" in table(results)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "1"], "--repeats 1: a single run says little; take at least 3"),
        (["--seconds", "0"], "--seconds 0.0: it must be above 0"),
        (["--batch", "1"], "--batch 1: batch norm needs at least 2"),
        (["--batch", "5000"], "48 samples, too few to measure batches of 5000: lower --batch"),
        (["--plot", "stages.pdf"], "give a name that ends in .png"),
        (["--json", "/no/such/folder/l.json"], "--json /no/such/folder/l.json cannot be written"),
        (["--json", "/proc/l.json"], "--json /proc/l.json cannot be written"),
        (["--stages", "read", "--trace", "t.json"], "add end_to_end to --stages"),
        (["--trace", "/no/such/folder/t.json"], "--trace /no/such/folder/t.json cannot be written"),
        (["--tune", "--budget", "-1"], "--budget -1.0: it must be above 0"),
        (["--batch", "8", "--backbone", "resnet51"], "resnet51"),
        (["--loader-threads", "3"], "nrecognized"),
    ],
)
def test_mistakes_end_with_code_2(
    photo_dataset_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert run(monkeypatch, "--data", str(photo_dataset_path), "--device", "cpu", *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err + captured.out


def test_no_data_is_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--data", str(tmp_path / "none"), "--device", "cpu") == 2
    assert "no dataset at" in capsys.readouterr().err


def test_images_are_as_large_and_dense_as_imagenets(tmp_path: Path) -> None:
    encoded = [draw_jpeg(0, number) for number in range(30)]
    assert encoded[:2] == [draw_jpeg(0, 0), draw_jpeg(0, 1)]
    images = [Image.open(io.BytesIO(data)) for data in encoded]
    assert 80e3 < np.mean([len(data) for data in encoded]) < 140e3
    width, height = np.mean([image.size for image in images], axis=0)
    assert 420 < width < 520
    assert 350 < height < 440
    write_images(tmp_path, 12, threads=2)
    assert len(list(tmp_path.glob("class-*/*.jpg"))) == 12


def test_synthetic_data_is_drawn_kept_and_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = ["--data", "synthetic", "--synthetic-samples", "12", "--synthetic-dir", str(tmp_path / "kept")]
    quick = [*SHORT, "--device", "cpu", "--stages", "read", "--repeats", "3"]
    assert run(monkeypatch, *kept, *quick) == 0
    assert "12 synthetic JPEGs, mean" in capsys.readouterr().out
    written = (tmp_path / "kept" / "dataset.json").stat().st_mtime_ns
    assert run(monkeypatch, *kept, *quick) == 0
    assert (tmp_path / "kept" / "dataset.json").stat().st_mtime_ns == written


@pytest.fixture
def quick_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TRIAL_S": 0.001, "FEWEST_ROUNDS": 2, "MOST_ROUNDS": 2, "QUEUES": ((1, 1, 2),)}.items():
        monkeypatch.setattr(tuning, name, value)


@pytest.mark.usefixtures("quick_tuning")
def test_tuning_prints_flags_that_pretrain_takes(
    photo_dataset_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found: list[LoaderConfig] = []
    tune = profile_throughput.tune
    monkeypatch.setattr(profile_throughput, "tune", lambda *of, **by: found.append(tune(*of, **by)))
    arguments = ["--data", str(photo_dataset_path), *SHORT, "--device", "cpu", "--backend", "torchvision", "--tune"]
    assert run(monkeypatch, *arguments, "--budget", "60") == 0
    printed = capsys.readouterr().out
    for words in ("threads:", "queues:", "<- chosen", "default against winner", "times as fast"):
        assert words in printed
    flags = printed.split("flags for pretrain.py: ")[1].split()
    config = parse_config(["--data", "d", "--run-dir", "r", "--backend", "torchvision", *flags])
    assert config.loader == found[0]


def rates_by_setting(monkeypatch: pytest.MonkeyPatch, rate: Callable[[LoaderConfig], float]) -> None:
    """Let --tune see these rates instead of measured ones."""

    def trial_of(runner: StageRunner, name: str, stage: Any) -> Trial:
        runner._batch_s[name] = 1.0
        return trial(rate(stage))

    monkeypatch.setattr(tuning, "make_stages", lambda bench, run: {"end_to_end": bench.loader})
    monkeypatch.setattr(StageRunner, "trial", trial_of)


def test_a_gain_is_adopted_and_carried_into_the_next_question(
    photo_dataset_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates_by_setting(monkeypatch, lambda loader: 100 + 50 * (loader.threads == 6) + 20 * (loader.prefetch == 1))
    arguments = ["--data", str(photo_dataset_path), *TINY, "--batch", "8", "--device", "cpu", "--tune"]
    assert run(monkeypatch, *arguments, "--threads", "4", "--backend", "torchvision") == 0
    printed = capsys.readouterr().out
    assert "flags for pretrain.py: --threads 6 --prefetch 1 --read-ahead 2 --dali.decoder mixed" in printed
    assert "the winner is 1.7 (1.7 .. 1.7) times as fast" in printed


def test_a_setting_that_needs_too_much_memory_is_left_out(
    photo_dataset_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def rate(loader: LoaderConfig) -> float:
        if loader.prefetch == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 100.0

    rates_by_setting(monkeypatch, rate)
    arguments = ["--data", str(photo_dataset_path), *TINY, "--batch", "8", "--device", "cpu", "--tune"]
    assert run(monkeypatch, *arguments, "--backend", "torchvision") == 0
    printed = capsys.readouterr().out
    assert "prefetch 4, DALI's 3, read ahead 8: out of GPU memory" in printed
    assert "--prefetch 2 " in printed.split("flags for pretrain.py: ")[1]


@pytest.mark.usefixtures("quick_tuning")
def test_a_budget_that_decides_nothing_is_a_mistake(
    photo_dataset_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(photo_dataset_path), *SHORT, "--device", "cpu", "--backend", "torchvision", "--tune"]
    assert run(monkeypatch, *arguments, "--budget", "1e-6") == 2
    assert "minutes are too few" in capsys.readouterr().err


def test_a_setting_changes_only_for_a_gain_that_shows() -> None:
    def chosen(present: tuple[float, ...], **others: tuple[float, ...]) -> str:
        return choose({label: [trial(rate) for rate in rates] for label, rates in {PRESENT: present, **others}.items()})

    assert chosen((100, 100, 100), same=(100.5, 100.4, 100.6)) == PRESENT
    assert chosen((100, 100, 100), better=(110, 111, 109)) == "better"
    assert chosen((100, 100, 100), once=(300,)) == PRESENT  # one trial proves nothing
    assert chosen((100, 100, 100), broken=(), better=(120, 120, 120)) == "better"
    assert chosen((), better=(120, 120, 120)) == PRESENT


def test_every_placement_of_the_decoder_is_tried() -> None:
    given = LoaderConfig(dali=DaliConfig(decoder="mixed", hw_decoder_load=0.65))
    tried = [config.dali for config in candidates("where to decode", given).values() if config != given]
    assert DaliConfig(decoder="cpu") in tried
    assert len({dali.hw_decoder_load for dali in tried}) >= 5
    assert given.dali not in tried


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Any:
    def answering(busy: int | Exception, used_mib: int) -> None:
        def utilization(_: torch.device) -> int:
            if isinstance(busy, Exception):
                raise busy
            return busy

        monkeypatch.setattr(torch.cuda, "utilization", utilization)
        monkeypatch.setattr(torch.cuda, "device_memory_used", lambda _: used_mib << 20)
        monkeypatch.setattr(gpu_monitor, "SAMPLE_EVERY_S", 0.01)

    return answering


def test_the_gpu_is_watched_from_outside(nvml: Any) -> None:
    nvml(87, 10240)
    begin = time.perf_counter()
    with GpuMonitor(torch.device("cuda")) as monitor:
        while monitor.between(begin, time.perf_counter()) is None:
            pass
        use = monitor.between(begin, time.perf_counter())
    assert use is not None
    assert (use.busy, use.memory_gib) == (pytest.approx(0.87), 10.0)
    with GpuMonitor(torch.device("cpu")) as nothing:
        assert nothing.between(begin, time.perf_counter()) is None


NO_NUMBER = (ModuleNotFoundError("nvidia-ml-py"), RuntimeError("no driver"), gpu_monitor.NVMLError(3))


@pytest.mark.parametrize(("busy", "warns"), [(87, True), (0, False), *((error, False) for error in NO_NUMBER)])
@pytest.mark.skipif(gpu_monitor.NVMLError is ModuleNotFoundError, reason="nvidia-ml-py is not installed")
def test_a_busy_gpu_is_warned_of(nvml: Any, busy: int | Exception, warns: bool) -> None:
    nvml(busy, 10240)
    warning = busy_with_others(torch.device("cuda"))
    assert (warning is not None) == warns
    if warning is not None:
        assert "busy with other work (87% of the time, 10.0 GiB taken)" in warning
    assert busy_with_others(torch.device("cpu")) is None


def test_missing_numbers_are_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_monitor, "NVMLError", ModuleNotFoundError)
    assert busy_with_others(torch.device("cuda")) == "the GPU's use is not measured: nvidia-ml-py is not installed"
    assert busy_with_others(torch.device("cpu")) is None
