"""The choice of a back end, its settings, and how an image is found that spoils a batch."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from pipeline.backends.base import BackendContext, Batch, DaliConfig, UndecodableBatchError
from pipeline.backends.select import check_compiler, choose_backend, open_backend
from pipeline.common.errors import UserError
from pipeline.dataset.dataset import ShardSet
from pipeline.loader.bad_samples import BadSamples
from pipeline.loader.config import LoaderConfig
from pipeline.loader.producer import ViewMaker
from pipeline.loader.read_batches import Assembler
from pipeline.sampling.sampler import BatchIds
from pipeline.sampling.views import ViewRecipe, draw_views


def pretend_installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in names else None)


def test_dali_is_chosen_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, "nvidia", "nvidia.dali")
    assert choose_backend("auto") == ("dali", "it is installed")
    assert choose_backend("dali") == ("dali", "asked for")
    assert choose_backend("torchvision") == ("torchvision", "asked for")


@pytest.mark.parametrize("installed", [(), ("nvidia",)], ids=["nothing of NVIDIA's", "other packages of NVIDIA's"])
def test_without_dali(monkeypatch: pytest.MonkeyPatch, installed: tuple[str, ...]) -> None:
    pretend_installed(monkeypatch, *installed)
    name, why = choose_backend("auto")
    assert name == "torchvision"
    assert "DALI is not installed" in why
    assert choose_backend("torchvision") == ("torchvision", "asked for")
    with pytest.raises(UserError, match=r"pip install nvidia-dali-cuda130.*--backend torchvision"):
        choose_backend("dali")


@pytest.mark.parametrize("requested", ["auto", "dali"])
def test_a_dali_that_cannot_be_imported_is_a_mistake_of_its_installation(
    requested: Literal["auto", "dali"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after pip install --no-deps, or with a library that is missing."""
    pretend_installed(monkeypatch, "nvidia", "nvidia.dali")
    monkeypatch.setitem(sys.modules, "nvidia.dali.fn", None)
    monkeypatch.delitem(sys.modules, "pipeline.backends.dali_backend", raising=False)
    with pytest.raises(UserError, match=r"cannot be imported \(.*nvidia.*pip install nvidia-dali-cuda130.*torchvision"):
        open_backend(requested)


@pytest.mark.parametrize(
    ("config", "flag", "fields"),
    [
        (LoaderConfig, "--threads", {"threads": -1}),
        (LoaderConfig, "--prefetch", {"prefetch": 0}),
        (LoaderConfig, "--read-ahead", {"read_ahead": 0}),
        (LoaderConfig, "--max-bad-samples", {"max_bad_samples": -1}),
        (DaliConfig, "--dali.prefetch", {"prefetch": 0}),
        (DaliConfig, "--dali.hw-decoder-load", {"hw_decoder_load": 1.5}),
        (DaliConfig, "--dali.preallocate-side", {"preallocate_side": -1}),
    ],
)
def test_impossible_settings_are_refused_by_name(config: Any, flag: str, fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"^{flag} "):
        config(**fields)


def test_a_batch_that_fails_though_every_image_is_good_is_no_images_fault(photo_dataset: ShardSet) -> None:
    """Say, memory ran out: nothing is replaced, and the trouble is named."""
    recipe, ids, reports = ViewRecipe(image_size=16), np.arange(3), []
    with ThreadPoolExecutor(1) as pool:
        assembler = Assembler(
            photo_dataset,
            lambda batch, ids: draw_views(recipe, 0, batch.epoch, ids, photo_dataset.sizes(ids)),
            pool,
            BadSamples(48, 10, reports.append),
        )
        maker = ViewMaker(
            assembler,
            LoaderConfig(backend="torchvision"),
            BackendContext(recipe, DaliConfig(), 3, torch.device("cpu"), torch.float32, pool, threads=1),
        )
        make = maker._make

        def fail_together(batches: Any) -> Any:
            for batch in batches:
                if len(batch) > 1:
                    raise UndecodableBatchError(batch, "out of memory")
                yield from make(iter([batch]))

        maker._make = fail_together  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match=r"each of them good.*out of memory"):
            next(maker.views([BatchIds(0, 0, ids)]))
    assert not reports


def test_an_undecodable_batch_names_its_reason() -> None:
    batch = Batch(
        0, 0, np.array([1]), np.array([1]), [], draw_views(ViewRecipe(), 0, 0, np.array([1]), np.ones((1, 2), np.int32))
    )
    error = UndecodableBatchError(batch, "because")
    assert error.batch is batch
    assert str(error) == error.reason == "because"


@pytest.mark.parametrize("cc", [None, "no-such-compiler"])
def test_a_gpu_without_a_c_compiler_is_refused_with_the_remedy(
    cc: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_compiler(torch.device("cpu"))
    check_compiler(torch.device("cuda"))  # of the machine that runs the tests
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if cc is not None:
        monkeypatch.setenv("CC", cc)
    check_compiler(torch.device("cpu"))
    with pytest.raises(UserError, match=r"(no C compiler|CC=no-such-compiler).*apt install gcc python3\.\d+-dev"):
        check_compiler(torch.device("cuda"))


def test_a_gpu_without_pythons_headers_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    with pytest.raises(UserError, match=r"headers are missing \(/nowhere/Python.h\).*apt install"):
        check_compiler(torch.device("cuda"))
