"""The command line: what it says, and its exit codes."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from pipeline.common.errors import UserError, exit_on_user_error
from pipeline.dataset.dataset import ShardSet
from tests.helpers.photos import image_bytes
from tools.make_shards import main

SCRIPT = Path(__file__).parents[2] / "tools" / "make_shards.py"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["make_shards.py", *map(str, arguments)])
    main()


def test_a_folder_becomes_a_dataset(photo_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, photo_folder, tmp_path / "out", "--samples-per-shard", "16", "--workers", "2"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "3 shards, 48 images" in ended.stdout
    assert "48/48" in ended.stderr
    assert "images/s" in ended.stderr
    assert "MB/s" in ended.stderr
    assert len(ShardSet.open(tmp_path / "out")) == 48


def test_mistakes_end_with_code_2(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, SCRIPT, tmp_path / "no", tmp_path / "out"], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: SOURCE")
    assert "Traceback" not in ended.stderr


def test_unknown_options_end_with_code_2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, tmp_path, tmp_path / "out", "--shuffle")
    assert ended.value.code == 2


def test_the_summary_counts_reasons(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.png").write_bytes(next(photo_folder.rglob("*.png")).read_bytes())
    for i in range(3):
        (tmp_path / "in" / f"bad {i}.jpg").write_bytes(b"")
    run(monkeypatch, tmp_path / "in", tmp_path / "out", "--labels", "none", "--split", "train", "--workers", 1)
    said = capsys.readouterr().out
    assert "1 shards, 1 images" in said
    assert "3  empty file" in said
    assert "rejected.jsonl" in said
    assert ShardSet.open(tmp_path / "out").split == "train"
    run(monkeypatch, tmp_path / "in", tmp_path / "out", "--labels", "none", "--split", "train")
    assert "complete already" in capsys.readouterr().out


def test_parts_say_what_is_missing(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, photo_folder, tmp_path / "out", "--samples-per-shard", 10, "--part", "0/2", "--workers", 1)
    assert "2 shards of other parts are missing" in capsys.readouterr().out


def test_user_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise UserError("value, rule, remedy")

    with pytest.raises(SystemExit) as ended:
        exit_on_user_error(fail)
    assert (ended.value.code, capsys.readouterr().err) == (2, "error: value, rule, remedy\n")


@pytest.mark.parametrize(("labelled", "told"), [(3, False), (2, True), (0, False)])
def test_a_dataset_of_which_a_part_is_labelled_is_one_without_labels_and_that_is_told(
    labelled: int,
    told: bool,
    photo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = sorted(photo_folder.rglob("*.png"))[:3]
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        for number, image in enumerate(images):
            tar.add(image, f"{number}.png")
            if number < labelled:
                (tmp_path / "label").write_text("0")
                tar.add(tmp_path / "label", f"{number}.cls")
    run(monkeypatch, f"wds:{tmp_path / 'in.tar'}", tmp_path / "out", "--workers", 1)
    assert ("some images have no label" in capsys.readouterr().out) == told
    assert ShardSet.open(tmp_path / "out").has_labels == (labelled == 3)


def test_a_place_where_no_folder_can_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"OUT .* cannot be made: Not a directory; name another folder"):
        run(monkeypatch, "synthetic:4", tmp_path / "file" / "out")


def test_the_summary_names_the_classes_and_counts_what_is_no_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for year in range(2019, 2025):
        (tmp_path / "in" / str(year)).mkdir(parents=True)
        (tmp_path / "in" / str(year) / "1.jpg").write_bytes(image_bytes(year))
    for number in range(12):
        (tmp_path / "in" / "2019" / f"{number}.heic").touch()
    (tmp_path / "in" / "2019" / "clip.mp4").touch()
    (tmp_path / "in" / "2019" / "broken\x1b[31m.jpg").write_bytes(b"x")
    run(monkeypatch, tmp_path / "in", tmp_path / "out", "--workers", 1)
    told = capsys.readouterr().out
    assert "6 classes from folders: 2019, 2020, 2021, 2022, 2023, ...; not classes? --labels none" in told
    assert "13  not an image file (12 .heic, 1 .mp4)" in told
    (tmp_path / "labels.csv").write_text('2019/1.jpg,"crane, \u202ebird"\n')
    run(monkeypatch, tmp_path / "in", tmp_path / "named", "--workers", 1, "--labels", tmp_path / "labels.csv")
    told = capsys.readouterr().out
    assert '1 classes from the file labels.csv: "crane, \\u202ebird"' in told
    assert "some images have no label, 5 of 6" in told
    assert told.replace("\n", "").isprintable()
