"""What the documents say can be done: links lead somewhere, commands and flags exist, examples run."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.dataset.dataset import ShardSet
from pipeline.sharding.make_dataset import make_dataset
from pipeline.sources import open_source
from siamstream.commands import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "README.md"])
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
SCRIPTS = {f"{command.module.replace('.', '/')}.py": verb for verb, command in COMMANDS.items()}
CALL = re.compile(r"(?:-m siamstream|(?<![\w./-])siamstream) (\w+)|\b((?:train|tools)/\w+\.py)")


def commands_of(page: Path) -> list[tuple[str, list[str]]]:
    """(verb, words behind it) of every command in an indented block; a line may go on after a backslash."""
    text = page.read_text().replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        if line.startswith("    ") and (call := CALL.search(line)):
            verb = call[1] or SCRIPTS.get(call[2], call[2])
            found.append((verb, shlex.split(line[call.end() :], comments=True)))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_files_that_the_pages_name_are_there() -> None:
    named = re.compile(r"`((?:pipeline|model|train|tools|tests|scripts|benchmarks|siamstream|examples)/[\w/]+\.\w+)`")
    examples = {("adding-a-method.md", "model/methods/barlow.py")}  # which the reader writes
    names = {(page.name, name) for page in PAGES for name in named.findall(page.read_text())} - examples
    assert {(page, name) for page, name in names if not (ROOT / name).exists()} == set()


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """The help of each verb that the pages use."""
    verbs = {verb for page in PAGES for verb, _ in commands_of(page)}
    assert {"shard", "preview", "pretrain", "linear", "knn", "export"} <= verbs <= set(COMMANDS)
    texts = {}
    for verb in sorted(verbs):
        script, printed = importlib.import_module(COMMANDS[verb].module), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.setattr(sys, "argv", [verb, "--help"])
            with pytest.raises(SystemExit):
                script.main()
        texts[verb] = printed.getvalue()
    return texts


def test_commands_of_the_pages_have_the_flags_that_they_are_given(helps: dict[str, str]) -> None:
    wrong = []
    for page in PAGES:
        for verb, words in commands_of(page):
            for flag in (word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)):
                known = re.compile(rf"(?<![\w-]){re.escape(flag)}(?![\w-])|{re.escape(flag.replace('--', '--no-'))}\b")
                if not known.search(helps[verb]):
                    wrong.append(f"{page.relative_to(ROOT)}: {verb} {flag}")
    assert wrong == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
    for verb in COMMANDS:
        assert f"`{verb}`" in (ROOT / "README.md").read_text()


def test_the_example_of_a_source_works(photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "adding-a-source.md").read_text(), re.DOTALL)
    monkeypatch.setattr(open_source, "KINDS", dict(open_source.KINDS))
    exec("\n".join(blocks), {"KINDS": open_source.KINDS, "__name__": __name__})
    images = sorted(photo_folder.rglob("*.jpg"))
    (tmp_path / "list.txt").write_text("\n".join(map(str, images)) + "\n")
    made = make_dataset(f"list:{tmp_path / 'list.txt'}", tmp_path / "out", quiet=True, in_process=True)
    assert made.images == len(images) > 10
    dataset = ShardSet.open(tmp_path / "out")
    stored = {dataset.read(sample) for sample in range(len(dataset))}
    assert stored == {image.read_bytes() for image in images}


def test_the_example_script_runs(photo_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "own_images.py"), str(photo_folder), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is most like") == 5
    done = subprocess.run([*command[:2], str(tmp_path / "missing"), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
