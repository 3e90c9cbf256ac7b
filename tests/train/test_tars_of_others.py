"""Tars of others, wds:PATTERN, in the place of a dataset: through an index that one process makes once."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.common.errors import UserError
from pipeline.common.locations import TarPattern, Url, location
from pipeline.common.mixed_data import WeightedPlace, mixed_data
from pipeline.sharding.make_dataset import make_dataset
from pipeline.sharding.options import ShardingOptions
from tests.helpers.photos import write_foreign_tars
from tests.helpers.servers import nginx, s3_here
from tests.helpers.toy_runs import call
from tests.train.test_pretrain import CPU, losses, run_here, torchrun
from tools import check_shards, embed, neighbours, preview_views, report
from train import finetune, knn, linear

pytestmark = pytest.mark.usefixtures("one_thread")
NAME = "set-{000000..000001}.tar"


@pytest.fixture
def served(tmp_path: Path) -> Path:
    return write_foreign_tars(tmp_path / "served")


def flags(data: object, work: Path, name: str, *more: str) -> list[str]:
    places = ["--data", str(data), "--run-dir", str(work / name), "--cache-dir", str(work / "cache")]
    return [*places, "--epochs", "2", "--global-batch", "4", "--knn-every", "0", *CPU, *more]


def indexes(work: Path) -> list[Path]:
    return [path for path in (work / "cache").glob("index-*") if path.is_dir()]


def test_later_runs_use_the_index_until_the_tars_change(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(f"wds:{served}/{NAME}", tmp_path / "local", ShardingOptions(), quiet=True, in_process=True)
    assert run_here(monkeypatch, flags(tmp_path / "local", tmp_path, "beside")) == 0
    with nginx(served, tmp_path / "nginx") as server:
        data = f"wds:{server.url}/{NAME}"
        assert run_here(monkeypatch, flags(data, tmp_path, "run")) == 0
        before = len([one for one in server.requests() if one.method == "GET"])
        assert losses(tmp_path / "run") == losses(tmp_path / "beside")
        assert run_here(monkeypatch, flags(data, tmp_path, "run", "--resume")) == 0
        assert len(indexes(tmp_path)) == 1
        assert len([one for one in server.requests() if one.method == "GET"]) == before  # the cache has the tars
        tar = served / "set-000001.tar"
        tar.write_bytes(tar.read_bytes() + bytes(10240))
        assert run_here(monkeypatch, flags(f"{data}:0.5", tmp_path, "changed", "--dry-run")) == 0
        assert len(indexes(tmp_path)) == 2


@pytest.mark.faults
def test_one_rank_makes_the_index(served: Path, tmp_path: Path) -> None:
    with nginx(served, tmp_path / "nginx") as server:
        ended = torchrun(2, flags(f"wds:{server.url}/{NAME}", tmp_path, "run", "--max-steps", "1"))
        assert ended.returncode == 0, ended.stderr
        assert ended.stderr.count("2 tars at") == 1
        fetched = [one.file for one in server.requests() if one.method == "GET" and one.file.endswith(".tar")]
        assert sorted(fetched) == ["set-000000.tar"] * 2 + ["set-000001.tar"] * 2  # for the index, and for the cache
    assert len(indexes(tmp_path)) == 1


def test_tars_in_a_bucket_are_trained_on_and_checked(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with s3_here(served, prefix="theirs"):
        data = f"wds:s3://images/theirs/{NAME}"
        assert run_here(monkeypatch, flags(data, tmp_path, "run", "--max-steps", "2")) == 0
        (index,) = indexes(tmp_path)
        cache = ["--cache-dir", str(tmp_path / "cache"), "--quiet"]
        assert call(monkeypatch, check_shards, str(index), *cache) == 0
        assert "11 samples in 2 shards" in capsys.readouterr().out
        assert call(monkeypatch, check_shards, str(index), *cache, "--repair") == 2
        assert "is the index of tars at s3://images/theirs" in capsys.readouterr().err
        assert not list((tmp_path / "cache").glob("check-*"))


def test_every_command_takes_tars_where_it_takes_a_dataset(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(served)
    data, run_dir, embedded = f"wds:./{NAME}", tmp_path / "run", tmp_path / "embedded"
    few = ["--epochs", "1", "--global-batch", "4", "--knn-k", "1", *CPU]
    places = ["--data", f"{data}:0.7", "--knn-data", f"wds:{served}/*.tar", "--run-dir", str(run_dir)]
    assert run_here(monkeypatch, [*places, *few]) == 0
    monkeypatch.chdir(tmp_path)  # config.json holds complete paths
    assert run_here(monkeypatch, ["--resume", "--run-dir", str(run_dir)]) == 0
    data = f"wds:{served}/{NAME}"
    both, device = ["--data", data, "--val-data", data, "--checkpoint", run_dir], ["--device", "cpu"]
    loading = [*device, "--threads", "1", "--backend", "torchvision"]
    assert call(monkeypatch, knn, *both, "--k", "1", *loading) == 0
    assert call(monkeypatch, linear, *both, "--epochs", "1", *loading) == 0
    assert (
        call(
            monkeypatch,
            finetune,
            *both,
            "--run-dir",
            tmp_path / "tuned",
            "--epochs",
            "1",
            "--global-batch",
            "4",
            *loading,
        )
        == 0
    )
    assert call(monkeypatch, embed, run_dir, data, embedded, *loading) == 0
    assert call(monkeypatch, neighbours, embedded, data, tmp_path / "near.png", *device) == 0
    assert call(monkeypatch, neighbours, embedded, data, tmp_path / "pairs.png", "--duplicates", "0.9") == 0
    assert call(monkeypatch, preview_views, data, tmp_path / "views.png", "--samples", "2", *device) == 0
    assert call(monkeypatch, report, run_dir) == 0
    assert "Left out" not in (run_dir / "report.html").read_text()
    assert capsys.readouterr().err.count("are indexed once") == 2
    missing = f"wds:{tmp_path}/nowhere-{{0..1}}.tar"
    for module, arguments in (
        (knn, [*both, "--val-data", missing, *loading]),
        (preview_views, [missing, tmp_path / "views.png"]),
        (embed, [run_dir, missing, tmp_path / "none", *loading]),
    ):
        assert call(monkeypatch, module, *arguments) == 2
        assert "nowhere-0.tar is missing; check the pattern" in capsys.readouterr().err
    assert call(monkeypatch, check_shards, data) == 2
    assert f"siamstream shard '{data}' OUT --index-only; then give OUT in their place" in capsys.readouterr().err


def test_what_data_may_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    local = mixed_data(["wds:set-{0..9}.tar"])
    assert str(local) == f"wds:{tmp_path}/set-{{0..9}}.tar"
    assert mixed_data(["wds:/a/?.tar:0.3", "b"]) == (
        WeightedPlace(TarPattern("/a/?.tar"), 0.3),
        WeightedPlace(Path("b"), 1),
    )
    (tmp_path / "wds:here").mkdir()
    assert mixed_data(["wds:here"]) == Path("wds:here")  # a folder of that name
    (tmp_path / "wds").mkdir()
    assert mixed_data(["wds:here.tar"]) == TarPattern(f"{tmp_path}/here.tar")  # no weight of a folder wds
    with pytest.raises(UserError, match="names no tars"):
        mixed_data(["wds:"])
    tars = mixed_data(["wds:s3://b/{0..9}.tar"])
    assert isinstance(tars, TarPattern)
    assert (str(tars), tars.secret) == ("wds:s3://b/{0..9}.tar", "s3://b/{0..9}.tar")
    assert mixed_data(["wds:s3://b/{0..9}.tar:0.3", "s3://c/d"]) == (
        WeightedPlace(tars, 0.3),
        WeightedPlace(Url("s3://c/d"), 1),
    )
    with pytest.raises(UserError, match="--index-only"):
        location("wds:s3://b/{0..9}.tar")


def test_mistakes(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with nginx(served, tmp_path / "nginx") as server:
        for pattern, message in (
            (f"{server.url}/set-{{000000..000002}}.tar", "no such file"),
            (f"{server.url}/*.tar", "are not looked up behind a URL"),
            (f"{server.url.replace('://', '://reader:hushhush@')}/{NAME}", "records no password or signature"),
        ):
            assert run_here(monkeypatch, flags(f"wds:{pattern}", tmp_path, "run")) == 2
            err = capsys.readouterr().err
            assert message in err
            assert "hushhush" not in err
    assert not indexes(tmp_path)
