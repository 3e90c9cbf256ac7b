"""What --data names: datasets, URLs with ports and passwords, weights, and mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.common.errors import UserError
from pipeline.common.locations import Url
from pipeline.common.mixed_data import data_parts, gather, mixed_data, weighted_place


@pytest.mark.parametrize(
    ("word", "place", "weight"),
    [
        ("data/a", "data/a", 1.0),
        ("data/a:0.3", "data/a", 0.3),
        ("data/a:2", "data/a", 2.0),
        ("data/a:1e-3", "data/a", 0.001),
        ("data/a:b", "data/a:b", 1.0),
        ("data/12:30:00", "data/12:30", 0.0),
        ("s3://a:0.3", "s3://a", 0.3),
        ("s3://a:2", "s3://a", 2.0),  # buckets have no port
        ("s3://a/b:c:0.5", "s3://a/b:c", 0.5),
        ("s3://a/b:c", "s3://a/b:c", 1.0),
        ("hf://datasets/o/r@main:.5", "hf://datasets/o/r@main", 0.5),
        ("http://host:9000", "http://host:9000", 1.0),
        ("http://host:9000:2", "http://host:9000", 2.0),
        ("http://host:0.5", "http://host", 0.5),
        ("http://host:9000/x:2", "http://host:9000/x", 2.0),
        ("http://[::1]:8000/x", "http://[::1]:8000/x", 1.0),
        ("http://[::1]:8000/x:3", "http://[::1]:8000/x", 3.0),
        ("https://me:0.5@host/x", "https://me:0.5@host/x", 1.0),
        ("https://host/x?time=12:30", "https://host/x?time=12:30", 1.0),
        ("https://host/x:4?time=12:30", "https://host/x?time=12:30", 4.0),
    ],
)
def test_words(word: str, place: str, weight: float) -> None:
    if weight == 0:
        with pytest.raises(UserError, match="a number above 0"):
            weighted_place(word)
        return
    assert weighted_place(word) == (Url(place) if "://" in place else Path(place), weight)


def test_a_folder_whose_name_has_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a:0.3").mkdir()
    assert weighted_place("a:0.3") == (Path("a:0.3"), 1.0)
    assert weighted_place("a:0.3:2") == (Path("a:0.3"), 2.0)
    Path("a").mkdir()
    with pytest.raises(UserError, match=r"there is a folder a:0\.3 and a folder a: write a:0\.3:1 or a/:0\.3"):
        weighted_place("a:0.3")
    assert weighted_place("a:0.3:1") == (Path("a:0.3"), 1.0)
    assert weighted_place("a/:0.3") == (Path("a"), 0.3)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "1e999", "0,3", "30%", "1.2.3", "-0.0"])
def test_weights_that_are_none(weight: str) -> None:
    with pytest.raises(UserError, match="is a number above 0"):
        weighted_place(f"a:{weight}")
    with pytest.raises(UserError, match="is a number above 0"):
        weighted_place(f"s3://bucket/a:{weight}")


def test_a_word_behind_a_folder_that_is_there(tmp_path: Path) -> None:
    for word in ("much", ""):
        with pytest.raises(UserError, match="is a number above 0"):
            weighted_place(f"{tmp_path}:{word}")


def test_one_of_weight_1_is_the_place_alone() -> None:
    assert mixed_data(["a"]) == mixed_data(["a:1"]) == Path("a")
    assert mixed_data(["a:2"]) == ((Path("a"), 2.0),)
    assert data_parts(Path("a")) == ((Path("a"), 1.0),)
    assert [str(part) for part in data_parts(mixed_data(["a", "s3://b:0.25"]))] == ["a:1", "s3://b:0.25"]


def test_none_and_twice() -> None:
    with pytest.raises(UserError, match="names no dataset"):
        mixed_data([])
    with pytest.raises(UserError, match="a is named twice"):
        mixed_data(["a", "b", "a:2"])


def test_flags_given_several_times() -> None:
    words = ["--data", "a", "--run-dir", "r", "--data=b:0.3", "--resume", "--data", "c", "d"]
    assert gather(words) == ["--run-dir", "r", "--resume", "--data", "a", "b:0.3", "c", "d"]
    assert gather(["--run-dir", "r"]) == ["--run-dir", "r"]
    assert gather(["--data"]) == ["--data"]
