"""check_shards and embed on a Ray cluster: the findings and the rows of this machine alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train.openmp  # noqa: F401
from pipeline.checking.check_dataset import inspect_dataset
from pipeline.checking.check_shard import CheckOptions
from pipeline.common.engine import EngineConfig, ray_engine
from tests.helpers.clusters import Squares, ray_cluster
from tests.helpers.servers import BUCKET, s3_here
from tests.helpers.toy_runs import call
from tools import check_shards
from tools import embed as embed_module
from tools.embedding.store import Embeddings

RAY = ("--engine", "ray")


@pytest.fixture(scope="module")
def bucket(photo_dataset_path: Path) -> Iterator[Any]:
    with s3_here(photo_dataset_path) as client:
        yield client


@pytest.fixture(scope="module")
def cluster(bucket: Any) -> Iterator[Any]:
    with ray_cluster(nodes=1) as made:
        yield made


def test_a_check_finds_the_same(cluster: Any, photo_dataset_path: Path, tmp_path: Path) -> None:
    options = CheckOptions(decode="full", workers=1)
    engine = EngineConfig("ray")
    copy = tmp_path / "photos"
    shutil.copytree(photo_dataset_path, copy)
    for harm in (False, True):
        if harm:
            data = bytearray((copy / "shard-000001.tar").read_bytes())
            data[1500] ^= 255
            (copy / "shard-000001.tar").write_bytes(data)
            (copy / "shard-000003.idx").unlink()
        here = inspect_dataset(copy, options, quiet=True)
        assert here.fine != harm
        there = inspect_dataset(copy, options, quiet=True, engine=engine)
        assert there == here


@pytest.mark.faults  # tens of seconds, since workers import torch
def test_a_check_of_a_bucket_fetches_shard_by_shard(
    cluster: Any, bucket: Any, photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, flags = tmp_path / "report.json", ("--quiet", "--cache-dir", tmp_path / "cache", *RAY)
    assert call(monkeypatch, check_shards, f"s3://{BUCKET}/photos", "--json", report, *flags) == 0
    here = inspect_dataset(photo_dataset_path, CheckOptions(), quiet=True)
    found = json.loads(report.read_text())
    assert found == json.loads(json.dumps(replace(here, path=f"s3://{BUCKET}/photos").as_json()))  # type: ignore[arg-type]
    bucket.put_object(Bucket=BUCKET, Key="photos/shard-000002.tar", Body=b"damaged")
    assert call(monkeypatch, check_shards, f"s3://{BUCKET}/photos", "--json", report, *flags) == 1
    assert {entry["where"] for entry in json.loads(report.read_text())["damage"]} >= {"shard-000002.tar"}


@pytest.mark.faults  # tens of seconds, since workers import torch
def test_embeddings_are_the_same(
    cluster: Any, photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--image-size", "32", "--device", "cpu", "--backend", "torchvision", "--threads", "1")
    monkeypatch.chdir(tmp_path)
    for out, more in (("here", ()), ("there", RAY)):
        assert call(monkeypatch, embed_module, "untrained:resnet_tiny", photo_dataset_path, out, *flags, *more) == 0
    here, there = Embeddings(tmp_path / "here"), Embeddings(tmp_path / "there")
    np.testing.assert_allclose(here.vectors, there.vectors, rtol=1e-5, atol=1e-6)
    assert there.names == here.names
    assert there.about == here.about
    assert call(monkeypatch, embed_module, "untrained:resnet_tiny", photo_dataset_path, "there", *flags, *RAY) == 0


def test_an_actor_that_dies_is_replaced(cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "once").touch()
    with ray_engine(EngineConfig("ray")) as engine:
        assert dict(engine.run_in_actors(partial(Squares, tmp_path), range(5), gpus=0)) == {n: n * n for n in range(5)}
        assert [rate.tasks for rate in engine.rates()] == [5]
    assert "its task is given to another worker" in capsys.readouterr().err
