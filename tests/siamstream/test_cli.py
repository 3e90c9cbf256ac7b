"""The console command: each verb is its script, and a wrong one gets an answer that helps."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from siamstream.cli import unknown, usage
from siamstream.commands import COMMANDS

ROOT = Path(__file__).parents[2]


def siamstream(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "siamstream", *words], capture_output=True, text=True, cwd=cwd)


def test_every_script_has_a_verb() -> None:
    scripts = {
        f"{folder}.{file.stem}"
        for folder in ("tools", "train")
        for file in (ROOT / folder).glob("*.py")
        if "exit_on_user_error(main)" in file.read_text()
    }
    assert {command.module for command in COMMANDS.values()} == scripts
    for command in COMMANDS.values():
        script = importlib.import_module(command.module)
        assert callable(script.main)
        # the command's name is how it was called: `siamstream pretrain` or `train/pretrain.py`
        assert 'prog="' not in inspect.getsource(script)


def test_the_list_of_verbs() -> None:
    for words in ((), ("--help",), ("-h",)):
        done = siamstream(*words)
        assert (done.returncode, done.stdout.strip()) == (0, usage())
    assert all(f"  {verb} " in usage() for verb in COMMANDS)


@pytest.mark.parametrize(
    ("word", "verb"),
    [
        ("pretran", "pretrain"),
        ("train", "pretrain"),
        ("train/pretrain.py", "pretrain"),
        ("make_shards", "shard"),
        ("make-shards", "shard"),
        ("tools/make_shards.py", "shard"),
        ("shards", "shard"),
        ("PROFILE", "profile"),
    ],
)
def test_a_wrong_verb_is_answered_with_the_right_one(word: str, verb: str) -> None:
    assert f"did you mean `siamstream {verb}`?" in unknown(word)


def test_a_word_like_no_verb_gets_the_list() -> None:
    done = siamstream("xyzzy")
    assert done.returncode == 2
    assert done.stderr.startswith("error: 'xyzzy' is no verb of siamstream. The verbs are shard, check, ")


@pytest.mark.parametrize("verb", ["shard", "pretrain"])
def test_the_help_of_a_verb_is_its_scripts(verb: str, tmp_path: Path) -> None:
    done = siamstream(verb, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: siamstream {verb} ")
    path = ROOT / (COMMANDS[verb].module.replace(".", "/") + ".py")
    script = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-20:] == script.stdout.splitlines()[-20:]


def test_a_users_mistake_ends_with_code_2_and_names_the_verb(tmp_path: Path) -> None:
    done = siamstream("shard", str(tmp_path / "missing"), str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    done = siamstream("pretrain", "--data", "x")
    assert done.returncode == 2
    assert "siamstream pretrain" in done.stderr


def test_a_reader_that_leaves_early_gets_no_traceback() -> None:
    for words in ((), ("pretrain", "--help")):
        command = [sys.executable, "-m", "siamstream", *words]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == b""
            assert process.wait(timeout=120) == 0
