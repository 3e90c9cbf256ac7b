"""The package as others get it: a wheel in an empty environment, and an editable install, in a folder of its user."""

from __future__ import annotations

import os
import shutil
import subprocess
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_SOURCE = (".git", ".venv", "*.egg-info", "build", "dist", "runs", "demo", "__pycache__", ".*_cache", ".hypothesis")

pytestmark = pytest.mark.wheel


class Installed:
    """A new environment with the package in it, and a user's project that has modules of our packages' names."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "venv" / "bin"
        self.project = folder / "project"
        venv.create(folder / "venv", with_pip=True)
        for name in ("model.py", "train.py", "tools/__init__.py", "tools/mine.py", "pipeline/views.py"):
            (self.project / name).parent.mkdir(parents=True, exist_ok=True)
            (self.project / name).write_text(f"WHOSE = {name!r}\n")

    def run(self, program: str, *words: str) -> str:
        """Output of a program of the environment, run in the project. Fails unless its exit code is 0."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        command = [str(self.bin / program), *words]
        done = subprocess.run(command, cwd=self.project, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def check(self) -> None:
        """The command and the import name work, and the project's own modules are the project's."""
        assert "siamstream VERB" in self.run("siamstream", "--help")
        self.run("siamstream", "shard", "synthetic:24", "data", "--workers", "2", "--samples-per-shard", "8")
        training = ("--data", "data", "--recipe", "demo", "--global-batch", "8", "--max-steps", "2", "--device", "cpu")
        self.run("siamstream", "pretrain", *training, "--run-dir", "one")
        torchrun = ("--standalone", "--nproc-per-node=2", "-m", "siamstream")
        self.run("torchrun", *torchrun, "pretrain", *training, "--run-dir", "two")
        for first, second in (("siamstream", "model"), ("model", "siamstream")):
            code = f"import {first}, {second}, model, train, tools.mine, pipeline.views\n"
            code += "print(siamstream.load_encoder('one').module(__import__('torch').zeros(1, 3, 32, 32)).shape[1])\n"
            code += "print(model.WHOSE, train.WHOSE, tools.mine.WHOSE, pipeline.views.WHOSE)"
            words = self.run("python", "-c", code).split()
            assert words == ["192", "model.py", "train.py", "tools/mine.py", "pipeline/views.py"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "siamstream"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("user"))


def test_a_wheel_in_an_empty_environment(checkout: Path, environment: Installed) -> None:
    environment.run("python", "-m", "pip", "install", "--quiet", "build")
    environment.run("python", "-m", "build", "--outdir", str(checkout.parent / "dist"), str(checkout))
    (wheel,) = (checkout.parent / "dist").glob("*.whl")
    environment.run("python", "-m", "pip", "install", "--quiet", str(wheel))
    files = "import importlib.metadata as m; print(*{str(f).split('/')[0] for f in m.files('siamstream')})"
    folders = set(environment.run("python", "-c", files).split())
    assert folders == {"siamstream", wheel.name.rpartition("-py3")[0] + ".dist-info", ".."}  # .. is bin/siamstream
    environment.check()


def test_an_editable_install(checkout: Path, environment: Installed) -> None:
    pip = ("-m", "pip", "--quiet")
    environment.run("python", *pip, "uninstall", "--yes", "siamstream")
    for left in (environment.bin.parent / "lib").glob("python*/site-packages/siamstream"):
        shutil.rmtree(left)  # numba's cache, which hides the editable install
    environment.run("python", *pip, "install", "-e", str(checkout))
    for folder in ("data", "one", "two"):
        shutil.rmtree(environment.project / folder, ignore_errors=True)
    environment.check()
    help_text = environment.run("python", str(checkout / "train" / "pretrain.py"), "--help")
    assert help_text.startswith(f"usage: {checkout / 'train' / 'pretrain.py'}")
