"""No spelling of a URL brings its password or signature into what a command prints or writes."""

from __future__ import annotations

import importlib
import itertools
import random
import sys
from pathlib import Path

import pytest

from pipeline.common.errors import exit_on_user_error
from pipeline.common.locations import Url, location
from pipeline.common.secrets import conceal, reveal, scrub

PASSWORD, SIGNATURE = "pa55w0rd-of-mine", "s1gnature-of-mine"


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was concealed here is no secret of the tests that follow."""
    monkeypatch.setattr("pipeline.common.secrets._concealed", {})
    monkeypatch.setattr("pipeline.common.secrets._words", set())


COMMANDS = {
    "tools.make_shards": [["{}", "out"], ["in", "{}"], ["in", "out", "--labels", "{}"]],
    "tools.check_shards": [["{}"], ["--nonsense", "{}"]],
    "train.pretrain": [
        ["--data", "{}", "--run-dir", "r"],
        ["--data={}", "--run-dir=r"],
        ["--data", "d", "--run-dir", "{}"],
        ["--data", "d", "--run-dir", "r", "--cache-dir", "{}"],
        ["--data", "d", "--run-dir", "r", "--knn-data", "{}"],
        ["--data", "d", "--run-dir", "r", "--init", "{}"],
        ["--dta", "{}", "--run-dir", "r"],
        ["--data", "d", "--run-dir", "r", "--config", "{}"],
        ["--data", "d", "--run-dir", "r", "--backbone", "{}"],
    ],
    "train.linear": [
        ["--data", "{}", "--val-data", "v", "--checkpoint", "c"],
        ["--data", "d", "--checkpoint", "{}"],
        ["--data", "d", "--val-data", "v", "--checkpoint", "untrained:resnet_tiny", "--run-dir", "{}"],
    ],
    "train.knn": [
        ["--data", "d", "--val-data", "{}", "--checkpoint", "untrained:resnet_tiny"],
        ["--data", "d", "--val-data", "v", "--checkpoint", "untrained:resnet_tiny", "--json", "{}"],
    ],
    "train.finetune": [
        ["--data", "{}", "--val-data", "v", "--checkpoint", "c", "--run-dir", "r"],
        ["--data", "d", "--val-data", "v", "--checkpoint", "{}", "--run-dir", "r"],
        ["--data", "d", "--val-data", "v", "--checkpoint", "c", "--run-dir", "{}"],
    ],
    "tools.predict": [["{}", "x.jpg"], ["r", "{}"]],
    "tools.neighbours": [
        ["{}", "d", "o.png"],
        ["e", "{}", "o.png"],
        ["e", "d", "{}"],
        ["untrained:resnet_tiny", "synthetic", "o.png", "--query", "{}"],
    ],
    "tools.plot_run": [["{}", "o.png"], ["r", "{}"]],
    "tools.embed": [["{}", "d", "o"], ["c", "{}", "o"], ["c", "d", "{}"]],
    "tools.export_backbone": [["{}", "o.pth"], ["c", "{}"]],
    "tools.preview_views": [["{}", "o.png"]],
    "tools.profile_throughput": [["--data", "{}"]],
    "tools.report": [["{}"], ["r", "--data", "{}"], ["r", "--out", "{}"]],
}


def spellings(count: int) -> list[str]:
    """Of one URL with a user, a password and a signature: right, and mistyped in every way that came to mind."""
    schemes = [
        "s3",
        "S3",
        "gs",
        "https",
        "HTTPS",
        "Http",
        "hf",
        "sftp",
        "filecache::s3",
        "simplecache::HTTPS",
        "blockcache::gs",
    ]
    colons = ["://", ":/", ":///", "://", " ://", ":// ", "::", ":"]
    users = ["reader:{p}", "{p}", ":{p}", "reader:{p}/x", "a:b:{p}", "reader%3A:{p}", "us er:{p}", "{p}:{p}", "r@x:{p}"]
    hosts = ["host", "host:99", "127.0.0.1:1", "bucket", "[::1]:1", ""]
    paths = ["", "/", "/folder", "/folder/sub dir", "//", "/a@b"]
    queries = ["", "?X-Amz-Signature={s}", "?a=b&sig={s}", "?{s}", "?sig={s}#part"]
    leading = ["", " ", "\t", "  "]
    every = list(itertools.product(leading, schemes, colons, users, hosts, paths, queries))
    chosen = random.Random(0).sample(every, count)
    made = ["".join([lead, s, c, u, "@", h, p, q]).format(p=PASSWORD, s=SIGNATURE) for lead, s, c, u, h, p, q in chosen]
    return [word for word in made if ":" in word]


def test_no_spelling_shows_its_secrets() -> None:
    for word in spellings(1000):
        shown = conceal(word)
        assert PASSWORD not in shown, word
        assert SIGNATURE not in shown, word
        assert reveal(shown) == word
        assert PASSWORD not in scrub(f"error at {word}"), word


ORDINARY = ["data/imagenet", "a@b", "x?y", "wds:/data/{00..99}.tar", "synthetic:200", "untrained:resnet50", "16:9", ""]


@pytest.mark.parametrize("word", ORDINARY)
def test_other_words_stay(word: str) -> None:
    assert conceal(word) == word


def test_a_concealed_url_reaches_the_server_whole() -> None:
    whole = f"https://reader:{PASSWORD}@host/folder?sig={SIGNATURE}"
    opened = location(conceal(whole))
    assert isinstance(opened, Url)
    assert opened.secret == whole
    assert str(opened) == "https://***@host/folder?***"


CASES = [(module, arguments) for module, calls in COMMANDS.items() for arguments in calls]


@pytest.mark.parametrize(("module", "arguments"), CASES)
def test_no_command_prints_them(
    module: str,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    command = importlib.import_module(module)
    for word in [word for word in spellings(400) if "host" not in word and "https://" not in word.lower()][:8]:
        monkeypatch.setattr(sys, "argv", [module, *(argument.format(word) for argument in arguments)])
        with pytest.raises(SystemExit):
            exit_on_user_error(command.main)
        shown = capfd.readouterr()
        assert PASSWORD not in shown.out + shown.err
        assert SIGNATURE not in shown.out + shown.err
    assert not [path for path in tmp_path.rglob("*") if PASSWORD in path.name]
