"""The packages inside `siamstream`, beside a user's own model.py and tools/: in a checkout and in a wheel."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from siamstream.naming import PACKAGES, rewritten

ROOT = Path(__file__).parents[2]
FILES = [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("from pipeline.common import errors", "from siamstream.pipeline.common import errors"),
        ("    from model import heads", "    from siamstream.model import heads"),
        ("import train.openmp  # first", "import siamstream.train.openmp  # first"),
        ("from tools import make_shards", "from siamstream.tools import make_shards"),
        ("from pipelines import x", "from pipelines import x"),
        ("import modelling", "import modelling"),
        ("x = model  # from model to view", "x = model  # from model to view"),
        ("    python tools/make_shards.py A B", "    siamstream shard A B"),
        ("write it with tools/make_shards.py", "write it with siamstream shard"),
        (
            "torchrun --nproc-per-node=8 train/pretrain.py --data",
            "torchrun --nproc-per-node=8 -m siamstream pretrain --data",
        ),
        ("see train/engine/loop.py", "see train/engine/loop.py"),
        ("tests/tools/make_shards.py", "tests/tools/make_shards.py"),
    ],
)
def test_what_is_rewritten(before: str, after: str) -> None:
    assert rewritten(before) == after
    assert rewritten(f"x = 1\n{before}\ny = 2\n") == f"x = 1\n{after}\ny = 2\n"


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_imports_or_uses_a_plain_name_once_it_is_rewritten(path: Path) -> None:
    tree = ast.parse(rewritten(path.read_text()))
    assert not [name for name in imports(tree) if name.partition(".")[0] in PACKAGES]
    # `import train.x` binds `siamstream` then, and no longer `train`, so nothing may be looked up as `train.x`
    plain = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    written = {name.removeprefix("siamstream.") for name in plain if name.startswith("siamstream.")}
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert attributes & written == set()
    # a module imported by a string is named after __package__
    calls = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not [
        call for call in calls if re.match(rf".*(import_module|__import__)\(f?['\"]({'|'.join(PACKAGES)})", call)
    ]


@pytest.fixture(scope="module")
def wheel_layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH with what a wheel puts into site-packages."""
    checkout, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    for name in ("siamstream", *PACKAGES):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout / name)
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", "build", "build_py", "--build-lib", str(out)]
    subprocess.run(command, cwd=checkout, check=True, env={**os.environ, "PYTHONPATH": ""}, capture_output=True)
    return out


@pytest.fixture(params=["checkout", "wheel"])
def installed(request: pytest.FixtureRequest, wheel_layout: Path) -> Path:
    return ROOT if request.param == "checkout" else wheel_layout


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's folder that has modules of all our names."""
    folder = tmp_path / "project"
    for name in ("model.py", "train.py", "tools/__init__.py", "tools/mine.py", "pipeline/__init__.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"WHOSE = {name!r}\n")
    return folder


def run_in(project: Path, installed: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *words], cwd=project, env=environment, capture_output=True, text=True, timeout=600
    )


def test_a_wheel_holds_one_package(wheel_layout: Path) -> None:
    assert [path.name for path in wheel_layout.iterdir()] == ["siamstream"]
    assert (wheel_layout / "siamstream" / "py.typed").is_file()


EVERY_MODULE = """
import pkgutil, siamstream
names = [module.name for module in pkgutil.walk_packages(siamstream.__path__, "siamstream.")]
for name in names:
    if not name.endswith(("__main__", "photometric_gpu")):
        __import__(name)
print(len(names))
import sys
print([name for name in sys.modules if name.partition(".")[0] in ("pipeline", "model", "train", "tools")])
"""


def test_every_module_of_a_wheel_can_be_imported(wheel_layout: Path, tmp_path: Path) -> None:
    done = run_in(tmp_path, wheel_layout, "-c", EVERY_MODULE)
    assert done.returncode == 0, done.stderr
    count, plain = done.stdout.split("\n")[:2]
    assert int(count) >= len(FILES)
    assert plain == "[]"


USE = """
import torch
import {first}
import {second}
import model, tools.mine, train, pipeline

if __name__ == "__main__":
    options = siamstream.ShardingOptions(samples_per_shard=8, workers=2)
    siamstream.make_dataset("synthetic:24", "data", options, quiet=True)
    assert siamstream.SimSiam is sys.modules["siamstream.model.methods.simsiam"].SimSiam
    with siamstream.open_views(
        siamstream.open_dataset("data"), siamstream.ViewRecipe(image_size=32), siamstream.LoaderConfig(),
        siamstream.BatchSampler(0, 8, 1), siamstream.World.alone(torch.device("cpu")),
    ) as batches:
        print(sum(len(batch.ids) for batch in batches))
    import model, tools.mine, train, pipeline
    print(model.WHOSE, tools.mine.WHOSE, train.WHOSE, pipeline.WHOSE)
"""


@pytest.mark.parametrize("order", [("siamstream, sys", "model"), ("model", "siamstream, sys")], ids=["after", "before"])
def test_a_users_modules_of_our_names_stay_hers(project: Path, installed: Path, order: tuple[str, str]) -> None:
    (project / "use.py").write_text(USE.format(first=order[0], second=order[1]))
    done = run_in(project, installed, "use.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["24", "model.py", "tools/mine.py", "train.py", "pipeline/__init__.py"]


def test_the_console_command_works_in_such_a_folder(project: Path, installed: Path) -> None:
    shard = ("-m", "siamstream", "shard", "synthetic:24", "data", "--workers", "2", "--samples-per-shard", "8")
    done = run_in(project, installed, *shard)
    assert done.returncode == 0, done.stderr
    run = ("--data", "data", "--run-dir", "run", "--recipe", "demo", "--global-batch", "8", "--max-steps", "2")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = run_in(project, installed, *torchrun, "-m", "siamstream", "pretrain", *run)
    assert done.returncode == 0, done.stderr
    assert (project / "run" / "summary.json").is_file()
    done = run_in(project, installed, "-m", "siamstream", "plot", "run")
    assert done.returncode == 0, done.stderr


def test_commands_start_each_other_by_the_names_that_exist(project: Path, wheel_layout: Path) -> None:
    done = run_in(project, wheel_layout, "-m", "siamstream", "demo", "--num-images", "24", "--steps", "1")
    assert done.returncode == 0, done.stderr
    assert "$ python -m siamstream shard synthetic:24" in done.stdout


def test_compiled_files_of_the_two_namings_do_not_mix(tmp_path: Path) -> None:
    code = "import siamstream.pipeline.sampling.order as order; print(order.__name__, order.epoch_order.__module__)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["siamstream.pipeline.sampling.order"] * 2
    written = [path.name for path in tmp_path.rglob("*.pyc")]
    assert any(name.startswith("naming.") for name in written)
    assert not any(name.startswith("order.") for name in written)
