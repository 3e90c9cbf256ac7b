"""Compiled code finds a place without a writable checkout and home folder, and only one that is this user's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pipeline.common.compiled_code import choose_triton_folder, private_folder

ROOT = Path(__file__).resolve().parents[3]
COMPILES = """
import numpy as np
from pipeline.backends.photometric_cpu import _brightness
planes = np.full((3, 4), 100, np.uint8)
_brightness(planes, np.float32(0.5))
print(planes[0, 0], _brightness._cache.cache_path)
"""


def test_a_read_only_checkout_without_a_home_folder(tmp_path: Path) -> None:
    """A file in the place of each folder refuses the superuser too."""
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "pipeline", checkout / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in [checkout / "pipeline", *(checkout / "pipeline").rglob("*/")]:
        if folder.is_dir():
            (folder / "__pycache__").write_bytes(b"")
    (tmp_path / "home").write_bytes(b"")
    (tmp_path / "temporary").mkdir()
    environment = {
        name: value for name, value in os.environ.items() if name not in ("XDG_CACHE_HOME", "NUMBA_CACHE_DIR")
    }
    environment |= {"HOME": str(tmp_path / "home" / "x"), "TMPDIR": str(tmp_path / "temporary"), "PYTHONPATH": ""}
    for _ in range(2):  # the second time it is there already
        done = subprocess.run(
            [sys.executable, "-c", COMPILES], cwd=checkout, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        value, folder_of_cache = done.stdout.split()
        assert value == "50"
        own = tmp_path / "temporary" / f"siamstream-numba-{os.geteuid()}"
        assert Path(folder_of_cache).is_relative_to(own)
        assert list(Path(folder_of_cache).glob("*.nbc"))


def test_a_folder_of_another_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    expected = tmp_path / f"siamstream-numba-{os.geteuid()}"
    assert private_folder("numba") == private_folder("numba") == expected
    assert expected.stat().st_mode & 0o777 == 0o700
    expected.chmod(0o777)
    assert private_folder("numba") != expected
    expected.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    expected.symlink_to(tmp_path / "elsewhere")
    assert private_folder("numba") != expected
    expected.unlink()
    expected.write_bytes(b"")
    other = private_folder("numba")
    assert other.is_dir()
    assert other != expected


def test_triton(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "file").write_bytes(b"")
    variables = {"TRITON_HOME": str(tmp_path / "new" / "home")}
    choose_triton_folder(variables)  # it can be made
    assert "TRITON_CACHE_DIR" not in variables
    variables = {"TRITON_HOME": str(tmp_path / "file" / "home")}
    choose_triton_folder(variables)
    assert variables["TRITON_CACHE_DIR"] == str(tmp_path / f"siamstream-triton-{os.geteuid()}")
    variables["TRITON_CACHE_DIR"] = "mine"
    choose_triton_folder(variables)
    assert variables["TRITON_CACHE_DIR"] == "mine"
