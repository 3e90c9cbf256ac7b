"""Steps as a CUDA graph: on a CPU with a recorder in the place of the graph, and under fake CUDA tensors.

A recorder replays operations, not Python (tests/helpers/recorded_graph.py): a rate, a momentum or a place in a queue
that is a number of Python's would stay what it was when the step was captured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from model.methods.registry import METHODS
from model.methods.simsiam import SimSiam
from pipeline.backends.base import ViewBatch
from pipeline.common.errors import UserError
from tests.helpers import apex_stand_in
from tests.helpers.fake_gpu import GPU, NoWaiting, fake_gpu
from tests.helpers.recorded_graph import record
from tests.train.engine.test_method_runs import flags
from tests.train.test_pretrain import alone, run_here
from train.config.recipes import parse_config
from train.config.run_config import PretrainConfig
from train.config.run_plan import RunPlan, make_plan
from train.distributed.process_group import DistContext
from train.engine.build import _prepare_batch_norm, prepare, step_graph
from train.engine.run import Origins, Run
from train.engine.step import train_step
from train.engine.step_graph import WARM_UP_STEPS, WARM_UP_STEPS_DDP, StepGraph, capture_on_gpu
from train.optimization.optimizer import build_optimizer, rates_as_tensors, set_rates
from train.optimization.precision import SkipNonFinite, choose_precision
from train.storage.checkpoints import CheckpointTimer

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, BAD = 8, 5
CPU = torch.device("cpu")
# What no graph can hold is launched by Python between two graphs
OPTIMIZERS = {
    "fused": ["--optimizer", "fused"],
    "foreach": ["--optimizer", "foreach"],
    "lars": ["--optimizer", "lars"],
    "adamw": ["--optimizer", "adamw", "--base-lr", "0.01"],
    "adamw, decay grows": ["--optimizer", "adamw", "--base-lr", "0.01", "--weight-decay-end", "0.4"],
}


@pytest.fixture(autouse=True)
def _doubles() -> Iterator[None]:
    """float64, in which no rounding grows to a difference."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def prepared(data: Path, run_dir: Path, method: str, *more: str) -> Run:
    """A run of STEPS steps of two passes."""
    return prepare(parse_config(flags(method, data, run_dir, "--epochs", "2", *more)), alone())


def as_on_a_gpu(run: Run) -> Run:
    """With the implementations that a GPU gets, and a guard that does not let the host look."""
    run.guard.host_decides = False
    for group in run.optimizer.param_groups:
        if isinstance(run.optimizer, torch.optim.AdamW):
            group["foreach"], group["fused"] = False, True
        elif "trust_coeff" in group:
            group["foreach"] = True
    return run


def replayed(run: Run, warm_up: int = 2) -> Run:
    """The same with the recorder in the place of the graph."""
    outside = rates_as_tensors(run.optimizer, run.plan.schedule, run.dist.device, scaled=False)
    run.graph = StepGraph(warm_up, run.dist.device, with_optimizer=outside is None, capture=record)
    return run


def batches(step: int, poison: bool) -> list[ViewBatch]:
    generator = torch.Generator().manual_seed(step)
    made = []
    for number in range(2):
        views = list(torch.randn(2, 6, 3, 16, 16, generator=generator))
        if poison and number == 1:
            views[0][0, 0, 0, 0] = torch.nan
        made.append(ViewBatch(views, np.arange(6), np.arange(6), epoch=0, step=step))
    return made


def trained(run: Run, first: int = 0, last: int = STEPS) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses and metrics of some steps, one of them with a nan; and the state after them."""
    run.model.train()
    numbers = []
    for step in range(first, last):
        run.step = step
        result = train_step(run, iter(batches(step, poison=step == BAD)))
        numbers.append(torch.stack([result.loss, *result.metrics.values(), result.skipped, result.z.mean()]).clone())
    return numbers, {name: value.clone() for name, value in run.model.state_dict().items()}


def assert_alike(one: Any, other: Any) -> None:
    """But for the rounding of float32 where methods keep it whatever the model's."""
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8, equal_nan=True)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_as_without_a_graph(photo_dataset_path: Path, tmp_path: Path, method: str) -> None:
    """Teacher, queue and phases move on; the bad step is skipped; SwAV's queue and prototypes come in later."""
    more = ["--freeze-prototypes", "4"] if method in ("swav", "dino") else []
    eager = prepared(photo_dataset_path, tmp_path, method, "--optimizer", "fused", *more)
    graphed = replayed(prepared(photo_dataset_path, tmp_path, method, "--optimizer", "fused", *more), warm_up=1)
    expected, made = trained(eager), trained(graphed)
    assert_alike(made, expected)
    assert len({float(numbers[0]) for numbers in made[0]}) == STEPS  # no step is the one before again
    assert graphed.graph is not None
    assert len(graphed.graph._replays) == (1 if method != "dino" else 3)  # its weight decay grows


@pytest.mark.parametrize("flags", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_every_optimizer_trains_as_without_a_graph(photo_dataset_path: Path, tmp_path: Path, flags: list[str]) -> None:
    eager, graphed = (prepared(photo_dataset_path, tmp_path, "byol", *flags) for _ in range(2))
    expected, made = trained(as_on_a_gpu(eager)), trained(replayed(as_on_a_gpu(graphed)))
    assert_alike(made, expected)
    assert graphed.graph is not None
    assert len(graphed.graph._replays) == (1 if graphed.graph.with_optimizer else 3)


def test_the_rate_moves_from_replay_to_replay(photo_dataset_path: Path, tmp_path: Path) -> None:
    """The tensor that the recorded operations read is the one that ``set_rates`` fills."""
    run = replayed(prepared(photo_dataset_path, tmp_path, "simsiam", "--optimizer", "fused"), warm_up=0)
    run.model.train()
    steps = []
    for step in range(4):
        run.step = step
        before = [p.detach().clone() for p in run.model.projector.parameters()]
        train_step(run, iter(batches(0, poison=False)))
        momenta = [run.optimizer.state[p]["momentum_buffer"] for p in run.model.projector.parameters()]
        moved = zip(before, run.model.projector.parameters(), momenta, strict=True)
        ratios = torch.cat([((old - new) / momentum)[momentum.abs() > 1e-9] for old, new, momentum in moved])
        steps.append(float(ratios.median()))
    expected = [set_rates(run.optimizer, run.plan.schedule, step) for step in range(4)]
    assert steps == pytest.approx(expected, rel=1e-6)
    assert len(set(expected)) == 4


def test_a_run_resumed_in_the_middle_is_the_undisturbed_one(photo_dataset_path: Path, tmp_path: Path) -> None:
    runs = [replayed(prepared(photo_dataset_path, tmp_path, "moco-v2", "--optimizer", "fused")) for _ in range(3)]
    whole = trained(runs[0])
    first = trained(runs[1], last=4)
    runs[2].model.load_state_dict(runs[1].model.state_dict())
    state = runs[1].optimizer.state_dict()["state"]
    runs[2].optimizer.load_state_dict({**runs[2].optimizer.state_dict(), "state": state})  # as train/engine/run.py
    rest = trained(runs[2], first=4)
    assert_alike([numbers[0] for numbers in first[0] + rest[0]], [numbers[0] for numbers in whole[0]])
    assert_alike(rest[1], whole[1])


def test_what_waits_for_the_device_is_refused_with_the_remedy(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replayed(prepared(photo_dataset_path, tmp_path, "simsiam", "--optimizer", "fused"), warm_up=0)
    monkeypatch.setattr(type(run.model), "before_optimizer", lambda model, info: print(info.step.item()))
    with pytest.raises(UserError, match=r"cannot be captured \(operation not permitted.*--resume and --no-cuda-graph"):
        train_step(run, iter(batches(0, poison=False)))


def test_a_capture_is_of_the_current_stream_and_lets_the_loader_allocate(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []

    class Graph:
        def replay(self) -> None:
            done.append("replay")

    class Context:
        def __init__(self, graph: Graph, **options: Any) -> None:
            done.append((type(graph), options))

        def __enter__(self) -> None:
            done.append("begin")

        def __exit__(self, *_: Any) -> None:
            done.append("end")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Context)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the model's")
    capture_on_gpu(lambda: done.append("work"), "pool")()
    options = {"pool": "pool", "stream": "the model's", "capture_error_mode": "thread_local"}
    assert done == [(Graph, options), "begin", "work", "end", "replay"]


# On a GPU that is fake. Nothing is computed: what would make the host wait raises.


def configured(method: str, *more: str) -> PretrainConfig:
    return parse_config(flags(method, Path("data"), Path("run"), "--accumulate", "1", "--precision", "bf16", *more))


def on_fake_gpu(config: PretrainConfig, plan: RunPlan) -> tuple[Run, list[int]]:
    """A run; and how many operations each of its captures held. Inside of ``fake_gpu``."""
    dist, captures = DistContext(0, 1, 0, 1, GPU), []
    with GPU:
        model = config.model.build().train()
    _prepare_batch_norm(model, config, dist)
    precision = choose_precision(config.precision, GPU)
    scaled = precision.scaler.is_enabled()
    groups, lr = model.parameter_groups(), plan.schedule.peak_lr
    optimizer, _ = build_optimizer(config.optim, groups, lr, GPU, scaled)

    def capture(work: Any, pool: Any) -> Any:
        with NoWaiting() as checked:
            work()
        captures.append(checked.operations)
        return lambda: None

    outside = rates_as_tensors(optimizer, plan.schedule, GPU, scaled)
    run = Run(
        config=config,
        dist=dist,
        dataset=None,  # type: ignore[arg-type]  # no step looks at it
        plan=plan,
        precision=precision,
        model=model,
        parallel=model,
        memory=None,
        optimizer=optimizer,
        knn={},
        probe=None,
        timer=CheckpointTimer("1epoch"),
        guard=SkipNonFinite(model, optimizer, GPU),
        origins=Origins("", "", ""),
        graph=StepGraph(1, GPU, with_optimizer=outside is None, capture=capture),
    )
    return run, captures


def fake_steps(run: Run, count: int) -> None:
    for step in range(count):
        run.step = step
        views = [torch.empty(12, 3, 16, 16, device=GPU, dtype=run.precision.view_dtype) for _ in range(2)]
        with NoWaiting():
            train_step(run, iter([ViewBatch(views, np.arange(12), np.arange(12), epoch=0, step=step)]))


@pytest.mark.parametrize("method", METHODS)
def test_no_step_waits_for_a_gpu_nor_does_a_capture(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """The first step is launched by Python, the second one captured: passes, guard, optimizer, teacher and queue."""
    torch.set_default_dtype(torch.float32)
    config = configured(method)
    plan = make_plan(config, 48, 1)
    with fake_gpu(monkeypatch):
        run, captures = on_fake_gpu(config, plan)
        fake_steps(run, 2)
    assert len(captures) == (1 if run.graph is not None and run.graph.with_optimizer else 2)
    assert sum(captures) > 500


@pytest.mark.parametrize("more", [["--precision", "fp16"], ["--optimizer", "lars"], ["--optimizer", "adamw"]])
def test_nor_does_any_optimizer(monkeypatch: pytest.MonkeyPatch, more: list[str]) -> None:
    torch.set_default_dtype(torch.float32)
    config = configured("simsiam", *more)
    plan = make_plan(config, 48, 1)
    with fake_gpu(monkeypatch):
        run, captures = on_fake_gpu(config, plan)
        assert run.precision.scaler.is_enabled() == ("fp16" in more)
        fake_steps(run, 2)
    assert len(captures) == 1


def test_a_step_that_looks_at_a_value_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float32)
    config = configured("simsiam")
    plan = make_plan(config, 48, 1)
    with fake_gpu(monkeypatch):
        run, _ = on_fake_gpu(config, plan)
        monkeypatch.setattr(type(run.model), "before_optimizer", lambda model, info: bool(run.guard.skipped))
        with pytest.raises(AssertionError, match="the host would wait"):
            fake_steps(run, 1)


# What --cuda-graph makes of a configuration


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_is_captured_after_enough_steps(ranks: int) -> None:
    steps = WARM_UP_STEPS if ranks == 1 else WARM_UP_STEPS_DDP
    graph, line = decided("simsiam", "--optimizer", "fused", ranks=ranks)
    assert graph is not None
    assert line == f"a CUDA graph, captured after {steps} steps"
    assert [graph.is_due(None) for _ in range(steps + 2)] == [False] * steps + [True] * 2
    assert [graph.is_due("another phase") for _ in range(steps + 1)] == [False] * steps + [True]


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (["foreach"], "it reads the rate on the host"),
        (["adamw", "--weight-decay-end", "0.4"], "the weight decay, which changes from step to step, is a number"),
        (["apex"], "Apex's kernels take the rate as a number"),
    ],
)
def test_an_optimizer_that_no_graph_can_hold_is_launched_apart(
    monkeypatch: pytest.MonkeyPatch, optimizer: list[str], reason: str
) -> None:
    apex_stand_in.install(monkeypatch)
    graph, line = decided("simsiam", "--optimizer", *optimizer)
    assert graph is not None
    assert not graph.with_optimizer
    assert line == f"a CUDA graph, captured after {WARM_UP_STEPS} steps; the optimizer is outside of it, as {reason}"


def test_what_cannot_be_captured_is_launched_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decided("simsiam", device=CPU) == (None, "launched one kernel at a time: --cuda-graph, but there is no GPU")
    graph, line = decided("simsiam", "--targets", "moving-average", "--predictor", "none")
    assert graph is None
    assert "the host keeps a memory of the samples" in str(line)
    graph, line = decided("simsiam", "--probe")
    assert graph is None
    assert "--probe takes the labels of each batch from the host" in str(line)
    monkeypatch.setattr(SimSiam, "capturable", False)
    graph, line = decided("simsiam")
    assert graph is None
    assert "--method simsiam does not say that its steps can be captured" in str(line)


def decided(method: str, *more: str, ranks: int = 1, device: torch.device = GPU) -> tuple[StepGraph | None, str | None]:
    """What --cuda-graph makes of a configuration. The model is on a CPU, the graph's numbers nowhere."""
    config = configured(method, "--cuda-graph", *more)
    plan, model = make_plan(config, 48, ranks), config.model.build()
    optimizer, _ = build_optimizer(config.optim, model.parameter_groups(), 0.1, CPU)
    dist, precision = replace(alone(), world_size=ranks, device=device), choose_precision("fp32", CPU)
    with FakeTensorMode():
        return step_graph(config, dist, model, optimizer, plan, precision)


def test_a_run_says_on_a_cpu_that_it_has_no_graph(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    torch.set_default_dtype(torch.float32)
    assert run_here(monkeypatch, flags("simsiam", photo_dataset_path, tmp_path / "run", "--cuda-graph")) == 0
    assert capsys.readouterr().out.count("--cuda-graph, but there is no GPU") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu_replays_are_the_steps(photo_dataset_path: Path, tmp_path: Path, method: str) -> None:
    """The real graph: 8 steps, of which the fourth is captured, and a nan in the sixth."""
    torch.set_default_dtype(torch.float32)
    losses = []
    for more in ([], ["--cuda-graph"]):
        config = parse_config(flags(method, photo_dataset_path, tmp_path, "--precision", "fp32", *more))
        run = prepare(config, DistContext(0, 1, 0, 1, GPU))
        assert (run.graph is not None) == bool(more)
        run.model.train()
        losses.append([])
        for step in range(STEPS):
            run.step = step
            on_gpu = [replace(it, views=[view.to(GPU) for view in it.views]) for it in batches(step, step == BAD)]
            losses[-1].append(float(train_step(run, iter(on_gpu)).loss))
    assert losses[1] == pytest.approx(losses[0], abs=1e-3, nan_ok=True)
