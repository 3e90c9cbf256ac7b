"""Batch norm over ranks is that of the whole batch, in every number that it computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from model.methods.simsiam import SimSiam, SimSiamConfig
from model.sync_batchnorm import SyncBatchNorm, _Cuda, _Layer, _Plain, _Seen, synchronise

ROOT = Path(__file__).resolve().parents[2]
NARROW = {"float32": 2e-4, "bfloat16": 0.3}  # of gradients summed over a batch; float64 where no other type is named


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_compute_what_one_process_does(ranks: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = str(Path(__file__).parents[2] / "tests" / "helpers" / "sync_bn_ranks.py")
    done = subprocess.run([*command, script], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    cases = json.loads(done.stdout.splitlines()[-1])
    assert len(cases) == 5
    for name, apart in cases.items():
        assert {"output", "gradient", "running_mean", "running_var", "num_batches_tracked", "evaluation"} <= set(apart)
        assert ("weight" in apart) == (name != "without weights")
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("shape", "affine"), [((8, 16, 9, 9), True), ((8, 16), True), ((8, 16), False)])
def test_the_kernels_compute_what_plain_arithmetic_does(
    shape: tuple[int, ...], affine: bool, dtype: torch.dtype
) -> None:
    """As on one of two ranks, of which the other has other statistics."""
    torch.manual_seed(0)
    x, gradient = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
    if x.dim() == 4:
        x, gradient = (value.contiguous(memory_format=torch.channels_last) for value in (x, gradient))
    weight, bias = (torch.rand(16, device="cuda") + 0.5 if affine else None for _ in range(2))
    outcomes = []
    for kernels in (_Cuda, _Plain):
        running = torch.zeros(16, device="cuda"), torch.ones(16, device="cuda")
        layer = _Layer(weight, bias, *running, 1e-5, 0.1)
        mean, inverse_std = kernels.statistics(x, layer)
        both = torch.stack((mean, mean + 0.5)), torch.stack((inverse_std, inverse_std / 2))
        counts = torch.full((2,), x.numel() // 16, device="cuda", dtype=torch.float32)
        merged = kernels.merge(x, *both, counts, layer)
        seen = _Seen(x, *merged, counts, weight)
        sums = kernels.sums(gradient, seen)
        back = kernels.grad_input(gradient, seen, sums.gradient * 2, sums.gradient_times_centred * 2)
        assert (sums.weight is None, sums.bias is None) == (not affine, not affine)
        numbers = [value for value in sums if value is not None]
        outcomes.append([mean, inverse_std, *merged, *running, *numbers, kernels.normalise(x, *merged, layer), back])
    atol = 1e-4 if dtype == torch.float32 else 0.05
    for one, other in zip(*outcomes, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, atol=atol, rtol=0.02 if dtype != torch.float32 else 1e-4)
