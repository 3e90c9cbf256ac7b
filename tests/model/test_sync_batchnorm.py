"""Batch norm over ranks is that of the whole batch, in every number that it computes."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import sync_batchnorm
from model.methods.simsiam import SimSiam, SimSiamConfig, simsiam_loss
from model.sync_batchnorm import SyncBatchNorm, _Fused, _Shape, _Traceable, encode, prepare_batch_norm, synchronise

ROOT = Path(__file__).resolve().parents[2]
NARROW = {"float32": 2e-4, "bfloat16": 0.3}  # of gradients summed over a batch; float64 where no other type is named


def ranks_say(script: str, ranks: int) -> dict[str, dict[str, float]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    path = str(ROOT / "tests" / "helpers" / script)
    done = subprocess.run([*command, path], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "all_gather_into_tensor" not in done.stderr  # torch 2.14 warns of it
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_compute_what_one_process_does(ranks: int) -> None:
    cases = ranks_say("sync_bn_ranks.py", ranks)
    assert len(cases) == 8
    for name, apart in cases.items():
        assert {"output", "gradient", "running_mean", "running_var", "num_batches_tracked", "evaluation"} <= set(apart)
        assert ("weight" in apart) == ("without weights" not in name)
        assert max(apart.values()) < NARROW.get(name, 1e-9), (name, apart)


def test_all_layers_are_exchanged_and_nothing_else_changes() -> None:
    torch.manual_seed(0)
    model = SimSiam(SimSiamConfig(backbone="resnet18", dim=16, projector_hidden=16, predictor_hidden=4))
    before = {name: value.data_ptr() for name, value in model.state_dict().items()}
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    images = torch.randn(2, 3, 32, 32)
    expected = model.eval()(images, images)
    synchronise(model)
    assert [name for name, layer in model.named_modules() if isinstance(layer, SyncBatchNorm)] == layers
    assert len(layers) == 20 + 3 + 1
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == before
    assert all(torch.equal(*pair) for pair in zip(model(images, images), expected, strict=True))


def test_one_process_needs_no_others() -> None:
    """As the tests of the rest of the program and a single GPU run it."""
    layer, twin, x = nn.BatchNorm1d(4), nn.BatchNorm1d(4), torch.randn(8, 4)
    made = synchronise(layer)
    assert torch.equal(made(x), twin(x))
    assert torch.equal(made.running_var, twin.running_var)  # type: ignore[arg-type]


def tiny(**switches: Any) -> SimSiam:
    torch.manual_seed(0)
    return SimSiam(
        SimSiamConfig(
            **{
                "backbone": "resnet18",
                "stem": "small",
                "dim": 16,
                "projector_hidden": 16,
                "predictor_hidden": 4,
                **switches,
            }
        )
    )


def losses_and_gradients(model: SimSiam, steps: int = 2) -> tuple[list[float], list[Tensor | None], list[Tensor]]:
    torch.manual_seed(1)
    losses = []
    for _ in range(steps):
        loss = simsiam_loss(*model(torch.randn(16, 3, 32, 32), torch.randn(16, 3, 32, 32) * 2 + 1))
        loss.backward()
        losses.append(loss.item())
    return losses, [p.grad for p in model.parameters()], list(model.buffers())


@pytest.mark.parametrize("switches", [{}, {"predictor": "none"}, {"projector_bn": "hidden"}, {"predictor_bn": "all"}])
def test_one_pass_equals_a_pass_for_each_view(switches: dict[str, Any]) -> None:
    model = tiny(**switches)
    together = prepare_batch_norm(copy.deepcopy(model), over_ranks=False)
    passes = []
    together.backbone.conv1.register_forward_hook(lambda *_: passes.append(1))
    two, one = losses_and_gradients(model), losses_and_gradients(together)
    assert len(passes) == 2  # one for each step
    assert one[0] == pytest.approx(two[0], abs=1e-6)
    for ours, theirs in zip(one[1], two[1], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    for ours, theirs in zip(one[2], two[2], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


class Official(nn.Module):
    """As the official code lays SimSiam out: heads in ``encoder.fc`` and ``predictor``, a pass for each view."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torchvision.models.resnet18(zero_init_residual=True)
        self.encoder.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)  # as --stem small, for small images
        self.encoder.maxpool = nn.Identity()
        hidden = [nn.Linear(512, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU()]
        hidden += [nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU()]
        self.encoder.fc = nn.Sequential(*hidden, nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16, affine=False))
        self.predictor = nn.Sequential(nn.Linear(16, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 16))

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        z1, z2 = self.encoder(x1), self.encoder(x2)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        cosine = nn.CosineSimilarity(dim=1)
        return -(cosine(p1, z2.detach()).mean() + cosine(p2, z1.detach()).mean()) * 0.5


def test_one_pass_equals_the_official_code() -> None:
    model = prepare_batch_norm(tiny(), over_ranks=False)
    official = Official()
    names = {"backbone.": "encoder.", "projector.": "encoder.fc."}

    def theirs(name: str) -> str:
        return next((new + name.removeprefix(old) for old, new in names.items() if name.startswith(old)), name)

    official.load_state_dict({theirs(name): value for name, value in model.state_dict().items()})
    torch.manual_seed(1)
    x1, x2 = torch.randn(16, 3, 32, 32), torch.randn(16, 3, 32, 32) * 2 + 1
    loss, expected = simsiam_loss(*model(x1, x2)), official(x1, x2)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, official.get_parameter(theirs(name)).grad, atol=1e-6, rtol=1e-5)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, official.get_buffer(theirs(name)), atol=1e-6, rtol=1e-6)


def test_one_pass_is_taken_only_where_it_gives_the_same() -> None:
    """Not before the layers are prepared, not against the switch, not for views of several sizes."""

    def passes(model: SimSiam, sides: tuple[int, ...] = (32, 32)) -> int:
        seen: list[int] = []
        hook = model.backbone.conv1.register_forward_hook(lambda *_: seen.append(1))
        encode(nn.Sequential(model.backbone, model.projector), [torch.randn(4, 3, side, side) for side in sides])
        hook.remove()
        return len(seen)

    assert passes(tiny()) == 2
    assert passes(prepare_batch_norm(tiny(), one_pass=False)) == 2
    prepared = prepare_batch_norm(tiny())
    assert passes(prepared) == 1
    assert passes(prepared, (32, 32, 32)) == 1
    assert passes(prepared, (32, 24)) == 2
    prepared.projector[1] = nn.BatchNorm1d(16)  # of another kind: its statistics would be those of both views
    assert passes(prepared) == 2


def test_a_failed_pass_leaves_the_layers_as_they_were() -> None:
    model = prepare_batch_norm(tiny())
    with pytest.raises(RuntimeError):
        encode(model.backbone, [torch.randn(4, 5, 32, 32)] * 2)
    assert {layer.views for layer in model.modules() if isinstance(layer, SyncBatchNorm)} == {1}


@pytest.mark.parametrize("one_pass", [True, False])
def test_one_pass_halves_the_collectives(one_pass: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each layer in the forward pass, and one in the backward pass; without, as many for each view."""
    made: Counter[str] = Counter()

    def all_ranks(values: Tensor, ranks: int) -> Tensor:
        made["forward"] += 1
        return torch.stack([values] * ranks)

    def sum_over_ranks(values: Tensor, ranks: int) -> Tensor:
        made["backward"] += 1
        return values * ranks

    monkeypatch.setattr(sync_batchnorm.td, "is_initialized", lambda: True)
    monkeypatch.setattr(sync_batchnorm.td, "get_world_size", lambda: 2)
    monkeypatch.setattr(sync_batchnorm, "_all_ranks", all_ranks)
    monkeypatch.setattr(sync_batchnorm, "_sum_over_ranks", sum_over_ranks)
    model = prepare_batch_norm(tiny(), one_pass=one_pass)
    layers = sum(isinstance(layer, SyncBatchNorm) for layer in model.modules())
    simsiam_loss(*model(torch.randn(8, 3, 32, 32), torch.randn(8, 3, 32, 32))).backward()
    passes = 1 if one_pass else 2
    assert made == {"forward": passes * layers, "backward": passes * layers}


class Launches(TorchDispatchMode):
    """Counts the operations that compute something, each a launch on a GPU; not those that only look at memory."""

    IDLE = frozenset({"aten::detach", "aten::alias", "aten::_unsafe_view", "aten::empty", "aten::empty_like"})

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and func._schema.name not in self.IDLE
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_one_pass_launches_a_fifth_to_a_third_less(backbone: str) -> None:
    counted = []
    for one_pass in (False, True):
        config = SimSiamConfig(backbone=backbone, dim=16, projector_hidden=16, predictor_hidden=4)
        model = prepare_batch_norm(SimSiam(config), one_pass=one_pass)
        with Launches() as launches:
            simsiam_loss(*model(torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32))).backward()
        counted.append(launches.count)
    assert 1 / 5 < 1 - counted[1] / counted[0] < 1 / 3


class Operations(TorchDispatchMode):
    """Notes the name of each operation, and of those on a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.on_counters: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        self.seen[name] += 1
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        self.on_counters[name] += any(tensor.dtype == torch.int64 and tensor.dim() == 0 for tensor in tensors)
        return func(*args, **(kwargs or {}))


def test_one_operation_counts_the_batches_of_all_layers() -> None:
    model = prepare_batch_norm(tiny())
    with Operations() as operations:
        encode(nn.Sequential(model.backbone, model.projector), [torch.randn(4, 3, 32, 32)] * 2)
    assert +operations.on_counters == {"_foreach_add_": 1}
    assert model.backbone.bn1.num_batches_tracked.item() == 2


def test_layers_of_timm_keep_their_activation() -> None:
    norm_act = pytest.importorskip("timm.layers.norm_act")
    layer = norm_act.BatchNormAct2d(3)
    twin = prepare_batch_norm(copy.deepcopy(layer), over_ranks=False)
    assert isinstance(twin, SyncBatchNorm)
    views = [torch.randn(4, 3, 5, 5) for _ in range(2)]
    for one, other in zip(encode(twin, views), [layer(view) for view in views], strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
        assert one.min() >= 0
    assert list(twin.state_dict()) == list(layer.state_dict())


class Unknown(nn.BatchNorm1d):
    """With a forward pass of its own."""


@pytest.mark.parametrize("layer", [Unknown(3), nn.BatchNorm1d(3, momentum=None)])
def test_a_layer_that_cannot_be_replaced_is_named_or_stays(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(3, 3), layer)
    with pytest.raises(ValueError, match=r"(Unknown|momentum=None).* cannot take its statistics over ranks"):
        prepare_batch_norm(model)
    passes: list[int] = []
    prepare_batch_norm(model, over_ranks=False)[0].register_forward_hook(lambda *_: passes.append(1))
    encode(model, [torch.randn(4, 3)] * 2)
    assert model[1] is layer
    assert len(passes) == 2


def test_compiled_ranks_make_few_graphs_and_the_same_gradients() -> None:
    """One graph of the model, and two more around those that DDP breaks for its own sake."""
    cases = ranks_say("compiled_ranks.py", 2)
    assert set(cases) == {"alone", "DDP", "bfloat16"}
    for name, case in cases.items():
        assert case["graphs"] <= (3 if name == "DDP" else 1), (name, case)
        assert case["breaks"] <= (3 if name == "DDP" else 0), (name, case)
        assert case["missing"] == 0, (name, case)
        assert max(case["loss"], case["gradient"], case["buffer"]) <= (2e-2 if name == "bfloat16" else 2e-6), (
            name,
            case,
        )


# The kernels of torch's own SyncBatchNorm exist for GPUs only. Here are their formulas, so that what is done with them
# can be tested on a CPU.


def _stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(x.float(), [0, *range(2, x.dim())], correction=0)
    return mean, (variance + eps).rsqrt()


def _gather_stats(
    x: Tensor,
    means: Tensor,
    inverse_stds: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    share, total = (counts / counts.sum())[:, None], counts.sum()
    mean = (means * share).sum(dim=0)
    variance = ((inverse_stds**-2 - eps + (means - mean) ** 2) * share).sum(dim=0)
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(variance * total / (total - 1), momentum)
    return mean, (variance + eps).rsqrt()


def _elemt_out(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, inverse_std: Tensor, eps: float, *, out: Tensor
) -> Tensor:
    shape = (1, -1, *[1] * (x.dim() - 2))
    made = (x.float() - mean.view(shape)) * inverse_std.view(shape)
    made = made if weight is None else made * weight.view(shape)
    return out.copy_(made if bias is None else made + bias.view(shape))


def _backward_reduce(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    weight: Tensor | None,
    of_input: bool,
    of_weight: bool,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    over, shape = [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))
    total, times = gradient.float().sum(over), (gradient.float() * (x.float() - mean.view(shape))).sum(over)
    nothing = torch.empty(0)
    return total, times, times * inverse_std if of_weight else nothing, total if of_bias else nothing


def _backward_elemt(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    weight: Tensor | None,
    total: Tensor,
    times: Tensor,
    counts: Tensor,
) -> Tensor:
    assert counts.dtype == torch.int32
    shape = (1, -1, *[1] * (x.dim() - 2))
    values = counts.sum()
    slope = inverse_std**2 * times / values
    made = gradient.float() - (total / values).view(shape) - (x.float() - mean.view(shape)) * slope.view(shape)
    return (made * (inverse_std if weight is None else inverse_std * weight).view(shape)).to(x.dtype)


@pytest.fixture
def kernels_on_a_cpu() -> Iterator[None]:
    library = torch.library.Library("aten", "IMPL")
    library.impl("batch_norm_stats", _stats, "CPU")
    library.impl("batch_norm_gather_stats_with_counts", _gather_stats, "CPU")
    library.impl("batch_norm_elemt.out", _elemt_out, "CPU")
    library.impl("batch_norm_backward_reduce", _backward_reduce, "CPU")
    library.impl("batch_norm_backward_elemt", _backward_elemt, "CPU")
    yield
    library._destroy()


SHAPES = [((8, 16, 9, 9), True), ((8, 16), True), ((8, 16), False)]


def compare_with_plain(
    monkeypatch: pytest.MonkeyPatch, device: str, shape: tuple[int, ...], affine: bool, dtype: torch.dtype, views: int
) -> None:
    """As on one of two ranks, of which the other has other statistics."""
    torch.manual_seed(0)
    x, gradient = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    x[len(x) // 2 :] += 1  # views differ
    if x.dim() == 4:
        x, gradient = (value.contiguous(memory_format=torch.channels_last) for value in (x, gradient))
    weights = [(torch.rand(16, device=device) + 0.5).requires_grad_() if affine else None for _ in range(2)]
    outcomes = []
    for fused in (True, False):

        def other_rank(values: Tensor, ranks: int, fused: bool = fused) -> Tensor:
            """Its means are larger by 0.5, its variances four times those of this rank."""
            mean, spread = values.unbind(dim=1 if fused else 0)
            far = ((spread**-2 - 1e-5) * 4 + 1e-5).rsqrt() if fused else spread * 4
            return torch.stack((values, torch.stack((mean + 0.5, far), dim=1 if fused else 0)))

        monkeypatch.setattr(sync_batchnorm, "_all_ranks", other_rank)
        monkeypatch.setattr(sync_batchnorm, "_sum_over_ranks", lambda values, ranks: values * 2)
        running = torch.zeros(16, device=device), torch.ones(16, device=device)
        own = x.clone().requires_grad_()
        if fused:
            made = _Fused.apply(own, *weights, *running, _Shape(views, 2, 1e-5, 0.1))
        else:
            made, means, variances = _Traceable.apply(own, *weights, views, 2, 1e-5)
            values = 2 * x.numel() // 16 // views
            for mean, variance in zip(means, variances, strict=True):
                running[0].lerp_(mean, 0.1)
                running[1].lerp_(variance * values / (values - 1), 0.1)
        gradients = torch.autograd.grad(made, [own, *(w for w in weights if w is not None)], gradient)
        outcomes.append([made, *running, *gradients])
    atol = 1e-4 if dtype == torch.float32 else 0.05
    for one, other in zip(*outcomes, strict=True):
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
        torch.testing.assert_close(one, other, atol=atol, rtol=0.02 if dtype != torch.float32 else 1e-4)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize(("shape", "affine"), SHAPES)
def test_what_is_done_with_the_kernels_is_plain_arithmetic(
    shape: tuple[int, ...], affine: bool, views: int, kernels_on_a_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare_with_plain(monkeypatch, "cpu", shape, affine, torch.float32, views)


def test_a_layer_makes_its_constants_once(kernels_on_a_cpu: None) -> None:
    """Not in each step: they would be launches of their own."""
    sync_batchnorm._counts.cache_clear()
    made = []
    for _ in range(2):
        x = torch.randn(8, 16).requires_grad_()
        with Operations() as operations:
            output = _Fused.apply(x, None, None, torch.zeros(16), torch.ones(16), _Shape(2, 1, 1e-5, 0.1))
            output.backward(x.detach())
        made.append(operations.seen["full"])
    assert made == [2, 0]  # for forward and backward


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("shape", "affine"), SHAPES)
def test_the_kernels_compute_what_plain_arithmetic_does(
    shape: tuple[int, ...], affine: bool, dtype: torch.dtype, views: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare_with_plain(monkeypatch, "cuda", shape, affine, dtype, views)
