"""A tuning file fills what the command line leaves open, and everything that does not fit is refused with a remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.backends.base import DaliConfig
from pipeline.common.errors import UserError
from pipeline.loader.config import LoaderConfig
from train.config.loader_tuning import TUNABLE, LoaderTuning, check_ranks, load_tuning, save_tuning, settings_of
from train.config.recipes import parse_config

SETTINGS = {"threads": 6, "prefetch": 3, "dali.decoder": "cpu", "dali.hw_decoder_load": 0.9}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tuning.json"
    save_tuning(LoaderTuning(SETTINGS, ranks_per_machine=2, evidence={"img_per_s": [1, 2]}), path)
    return path


def parse(*flags: str) -> LoaderConfig:
    return parse_config(["--data", "d", "--run-dir", "r", *flags]).loader


def test_it_sets_what_no_flag_sets(file: Path) -> None:
    expected = LoaderConfig(threads=6, prefetch=3, dali=DaliConfig(decoder="cpu", hw_decoder_load=0.9))
    assert parse("--loader-tuning", str(file)) == expected
    more = parse("--loader-tuning", str(file), "--read-ahead", "9", "--threads", "6", "--dali.prefetch", "5")
    assert (more.read_ahead, more.threads, more.dali.prefetch, more.prefetch) == (9, 6, 5, 3)


def test_other_flags_stay_as_they_are(file: Path) -> None:
    flags = ["--data", "d", "--run-dir", "r", "--resume", "--no-sync-bn", "--backbone", "resnet18", "--hue", "0.2"]
    plain, tuned = parse_config(flags), parse_config([*flags, "--loader-tuning", str(file)])
    assert tuned.loader != plain.loader
    assert {**tuned.as_json(), "loader": 0, "loader_tuning": 0} == {**plain.as_json(), "loader": 0, "loader_tuning": 0}
    assert tuned.identity("f") == plain.identity("f")  # a run may go on with another file


@pytest.mark.parametrize(
    ("flag", "value"), [("--threads", "4"), ("--threads", "0"), ("--dali.decoder", "mixed"), ("--prefetch", "2")]
)
def test_a_flag_that_disagrees_is_an_error_even_with_the_default(file: Path, flag: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"{flag} {value}, but --loader-tuning .* leave {flag} out"):
        parse("--loader-tuning", str(file), flag, value)


def test_saved_settings_come_back(file: Path) -> None:
    assert load_tuning(file).settings == SETTINGS
    whole = settings_of(LoaderConfig(threads=3))
    assert tuple(whole) == TUNABLE
    save_tuning(LoaderTuning(whole, 1), file)
    assert load_tuning(file).fill(LoaderConfig(threads=1, prefetch=9)) == LoaderConfig(threads=3)


def test_threads_belong_to_a_number_of_ranks(file: Path) -> None:
    check_ranks(None, 8)
    check_ranks(file, 2)
    with pytest.raises(UserError, match=r"measured for 2 ranks a machine, this run has 8.*--ranks-per-machine 8"):
        check_ranks(file, 8)
    save_tuning(LoaderTuning({"prefetch": 3}, 2), file)
    check_ranks(file, 8)


def whole(**changes: Any) -> dict[str, Any]:
    return {"loader_tuning_version": 1, "ranks_per_machine": 1, "settings": {"threads": 2}, **changes}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "is no JSON"),
        ([], "is no tuning file of version 1"),
        ({"threads": 4}, "is no tuning file of version 1"),
        (whole(loader_tuning_version=2), "is no tuning file of version 1"),
        (whole(settings=None), "lacks its settings"),
        (whole(ranks_per_machine=0), "lacks its settings"),
        (whole(settings={"threads": 2, "fans": 1, "backend": "dali"}), "names backend, fans; known are threads"),
        (whole(settings={"threads": "2"}), "threads '2': it must be a whole number from 0 up"),
        (whole(settings={"threads": True}), "threads True: it must be a whole number"),
        (whole(settings={"prefetch": 0}), "prefetch 0: it must be a whole number from 1 up"),
        (whole(settings={"dali.decoder": "gpu"}), "dali.decoder 'gpu': it must be one of mixed, cpu"),
        (whole(settings={"dali.hw_decoder_load": 1.5}), "dali.hw_decoder_load 1.5: it must be a number from 0 to 1"),
    ],
)
def test_what_is_no_tuning_file_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "tuning.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=message):
        parse("--loader-tuning", str(path))
