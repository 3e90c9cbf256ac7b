"""The GPU's kernels: they compile for the GPUs of today, and they equal the CPU's stage, interpreted and for real."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.backends.photometric import Photometric
from pipeline.sampling.views import ViewRecipe, draw_views
from tests.helpers.crafted import difference, squares, transformed

pytest.importorskip("triton", reason="Triton comes with torch on Linux only")

KERNELS = {
    "_gray_sums": "squares:*u8 sums:*fp32 flags:*i32 numbers:*fp32 pixels=50176 BLOCK=1024",
    "_colour": "squares:*u8 sums:*fp32 coloured:*u8 flags:*i32 numbers:*fp32 pixels=50176 parts=49 BLOCK=1024",
    "_blur_rows": "coloured:*u8 rows:*fp32 numbers:*fp32 side=224 RADIUS=11 BLOCK=1024",
    "_finish": "coloured:*u8 rows:*fp32 out:*{out} flags:*i32 numbers:*fp32 "
    "threshold=128 side=224 RADIUS=11 BLOCK=1024",
}
COLOURS = ("_gray_sums", "_colour")  # are rounded as on the CPU
# 4 warps a program and 65,536 registers an SM: with so many a thread, 5 programs run side by side there
MOST_REGISTERS = 96


def assembled(name: str, capability: int, out: str = "fp16") -> Any:
    """The kernel for a GPU that need not be here."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pipeline.backends import photometric_gpu

    words = KERNELS[name].format(out=out).split()
    signature = dict(word.split(":") for word in words if ":" in word)
    constants = {key: int(value) for key, value in (word.split("=") for word in words if "=" in word)}
    source = ASTSource(
        fn=getattr(photometric_gpu, name),
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
    )
    options = {"enable_fp_fusion": name not in COLOURS}  # as the stage asks for
    return compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=options)


def resource_usage(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers of a thread, and its bytes of stack and of local memory, to which registers are spilled."""
    import triton

    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"  # comes with Triton
    said = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", said)
    assert found is not None, said
    return dict(zip(("registers", "stack", "spilled"), map(int, found.groups()), strict=True))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_without_a_gpu(capability: int, name: str, tmp_path: Path) -> None:
    """Without registers that spill to memory, and with few enough to fill a GPU."""
    for out in ("fp16", "bf16", "fp32") if name == "_finish" else ("fp16",):
        compiled = assembled(name, capability, out)
        assert ("fma.rn.f32" in compiled.asm["ptx"]) == (name not in COLOURS)
        assert f".target sm_{capability}" in compiled.asm["ptx"]
        usage = resource_usage(compiled.asm["cubin"], tmp_path)
        assert 0 < usage["registers"] <= MOST_REGISTERS, (out, usage)
        assert usage["stack"] == usage["spilled"] == 0, (out, usage)


def test_a_view_needs_one_upload_and_64_images_fill_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100 runs 132 x 5 programs of MOST_REGISTERS side by side."""
    from pipeline.backends import photometric_gpu

    uploads: list[tuple[int, ...]] = []
    grids: dict[str, tuple[int, ...]] = {}

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids[self.name] = grid
            return lambda *_, **__: None

    def uploaded(values: Any, device: torch.device) -> torch.Tensor:
        uploads.append(values.shape)
        return torch.from_numpy(values).to(device)

    monkeypatch.setattr(photometric_gpu, "on_device", uploaded)
    for name in KERNELS:
        monkeypatch.setattr(photometric_gpu, name, Kernel(name))
    recipe = ViewRecipe(image_size=224)
    params = draw_views(recipe, 5, 0, np.arange(64), np.full((64, 2), 224, dtype=np.int32))
    ones = np.ones(3, dtype=np.float32)
    made = photometric_gpu.transform_on_gpu(
        torch.zeros(64, 224, 224, 3, dtype=torch.uint8), params, 0, recipe, ones, ones, torch.float16
    )
    assert made.shape == (64, 3, 224, 224)
    assert uploads == [(64, 19)]
    assert set(grids) == set(KERNELS)
    assert all(np.prod(grid) > 132 * 5 for grid in grids.values())


def test_interpreted_kernels_equal_the_cpu() -> None:
    script = Path(__file__).parents[3] / "tests" / "helpers" / "interpreted_kernels.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cases = json.loads(done.stdout.splitlines()[-1])
    # A tap more or less would show: 2e-3 of 255.
    assert cases.pop("rows blurred with ceil(4 sigma) taps")["max"] <= 2e-4
    assert len(cases) == 4
    for name, case in cases.items():
        assert case["channels_last"], name
        assert case["mean"] <= 0.02, name
        assert case["max"] <= 2 + 1e-3, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("side", [2, 33, 224])
@pytest.mark.parametrize("kind", ["smooth", "noise", "constant"])
def test_a_gpu_equals_the_cpu(kind: str, side: int, dtype: torch.dtype) -> None:
    recipe, count = ViewRecipe(image_size=side, solarize_prob=0.2), 64 if side < 100 else 16
    images = squares(kind, count, side)
    params = draw_views(recipe, 5, 0, np.arange(count), np.full((count, 2), side, dtype=np.int32))
    device = torch.device("cuda")
    with ThreadPoolExecutor(1) as pool:
        views = Photometric(recipe, device, dtype, pool, 1)([images.to(device)] * 2, params)
    for view in views:
        assert view.dtype == dtype
        assert view.is_contiguous(memory_format=torch.channels_last)
    apart = difference([view.cpu() for view in views], transformed(images, params, recipe), recipe)
    rounding = {torch.float32: 0.0, torch.float16: 0.07, torch.bfloat16: 0.6}[dtype]  # half a step at 2.6 std, of 255
    assert apart.mean() <= 0.02 + rounding
    assert apart.max() <= 4 + 2 * rounding
