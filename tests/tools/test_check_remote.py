"""check_shards.py takes the URL of a dataset: the same findings as in its folder, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers.servers import nginx
from tests.helpers.toy_runs import call
from tools import check_shards


def test_a_url_is_checked_like_its_folder(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "data" / "photos"
    shutil.copytree(photo_dataset_path, copy)
    cache, report = tmp_path / "cache", tmp_path / "report.json"
    flags = ("--cache-dir", cache, "--json", report, "--quiet", "--workers", "1", "--decode", "none")
    with nginx(copy.parent, tmp_path / "nginx") as server:
        url = f"{server.url}/photos"
        assert call(monkeypatch, check_shards, url, *flags) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"{url}: 48 samples in 5 shards")
        assert "nothing is damaged" in out
        assert json.loads(report.read_text())["path"] == url
        assert list(cache.iterdir()) == []

        tar = copy / "shard-000001.tar"
        data = bytearray(tar.read_bytes())
        data[1500] ^= 255
        tar.write_bytes(data)
        (copy / "shard-000002.idx").unlink()
        assert call(monkeypatch, check_shards, url, *flags) == 1
        damage = json.loads(report.read_text())["damage"]
        assert {entry["where"] for entry in damage} >= {"shard-000001.tar", "shard-000002.idx"}

        capsys.readouterr()
        assert call(monkeypatch, check_shards, url, *flags, "--repair") == 2
        assert "--repair writes files" in capsys.readouterr().err
        assert call(monkeypatch, check_shards, f"{server.url}/missing", *flags, "--retry-minutes", "0") == 2
        assert "cannot fetch dataset.json" in capsys.readouterr().err
