"""Bad input of every command: one message that says what is wrong, exit code 2, no traceback, nothing left behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import siamstream.cli
from siamstream.commands import COMMANDS

# (words of the command line, part of the message); $DATA is a dataset, $NONE a path that is not there, $OUT a new one,
# $TEXT a text file, $FOLDER an empty folder
CASES = [
    ("shard $NONE $OUT", "does not exist: give a folder, tar"),
    ("shard $FOLDER $OUT", "no images in"),
    ("shard $TEXT $OUT", "notes.txt"),
    ("shard $DATA $OUT --hold-out 1", "--hold-out 1.0: a share lies between 0 and 1"),
    ("shard $DATA $OUT --hold-out -0.1", "--hold-out -0.1: a share lies between 0 and 1"),
    ("shard synthetic:1 $OUT --hold-out 0.5", "leaves one side of 1 images empty"),
    ("check $NONE", "no dataset at"),
    ("preview $NONE $OUT.png", "nowhere"),
    ("preview $DATA $OUT.jpg", "a name that ends in .png"),
    ("preview $DATA $OUT.png --samples 0", "--samples 0"),
    ("preview $DATA $OUT.png --posterize.prob 2", "--posterize.prob 2.0: a probability lies in 0 .. 1"),
    ("preview $DATA $OUT.png --run-dir $NONE", "config.json"),
    ("pretrain --data $NONE --run-dir $OUT", "nowhere"),
    ("pretrain --data $DATA --run-dir $TEXT --device cpu --global-batch 8", "notes.txt"),
    ("pretrain --data $DATA --run-dir $OUT --device cpu --log comet", "--log comet: it takes tensorboard"),
    ("pretrain --data $DATA --run-dir $OUT --device cpu --log-project=", "--log-project '': it takes a name"),
    ("pretrain --data $DATA --run-dir $OUT --device cpu --config $NONE", "cannot be read"),
    ("pretrain --data $DATA --run-dir $OUT --device cpu --config $TEXT", "is no JSON"),
    (
        "pretrain --data $DATA --run-dir $OUT --device cpu --dry-run --global-batch 4096",
        "fewer than one --global-batch",
    ),
    ("pretrain --data $DATA --run-dir $OUT --device cpu --posterize.bits 0", "--posterize.bits 0: a byte has 1 .. 8"),
    ("pretrain --print-config --method simsam", "simsam"),
    ("pretrain --print-config --config $FOLDER", "cannot be read"),
    ("linear --checkpoint $NONE --data $DATA --val-data $DATA --device cpu", "nowhere"),
    ("knn --checkpoint $NONE --data $DATA --val-data $DATA --device cpu", "nowhere"),
    ("finetune --checkpoint $NONE --data $DATA --val-data $DATA --run-dir $OUT --device cpu", "nowhere"),
    (
        "finetune --checkpoint $NONE --data $DATA --val-data $DATA --run-dir $OUT --fraction 0",
        "--fraction",
    ),
    ("finetune --checkpoint untrained:resnet_tiny --data $DATA --val-data $DATA --run-dir $OUT --mixup -1", "--mixup"),
    ("finetune --checkpoint untrained:resnet_tiny --data $DATA --val-data $NONE --run-dir $OUT", "nowhere"),
    ("predict $NONE $TEXT", "nowhere"),
    ("predict $NONE", "at least one image or folder"),
    ("embed $NONE $DATA $OUT", "nowhere"),
    ("embed untrained:resnet_tiny $NONE $OUT", "nowhere"),
    ("embed untrained:resnet_tiny $DATA $OUT --features projector", "projector"),
    ("embed untrained:no_such_net $DATA $OUT", "no_such_net"),
    ("neighbours $NONE $DATA $OUT.png", "nowhere"),
    ("neighbours untrained:resnet_tiny $DATA $OUT", "a name that ends in .png"),
    ("neighbours untrained:resnet_tiny $DATA $OUT.png --duplicates 2", "--duplicates 2.0"),
    ("neighbours untrained:resnet_tiny $DATA $OUT.png --query no-such-image --device cpu", "no-such-image"),
    ("report $NONE", "is no run folder"),
    ("report", "run folder"),
    ("report $FOLDER --samples 0", "--samples"),
    ("export $NONE $OUT.pth", "nowhere"),
    ("plot $NONE $OUT.png", "nowhere"),
]


@pytest.fixture(scope="module")
def places(photo_dataset_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "notes.txt").write_text("these are no settings")
    (folder / "empty").mkdir()
    paths = {"DATA": photo_dataset_path, "NONE": folder / "nowhere", "TEXT": folder / "notes.txt"}
    return {name: str(path) for name, path in {**paths, "FOLDER": folder / "empty", "OUT": folder / "out"}.items()}


@pytest.mark.parametrize(("line", "message"), CASES, ids=[line for line, _ in CASES])
def test_one_message_and_code_2(
    line: str,
    message: str,
    places: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, path in places.items():
        line = line.replace(f"${name}", path)
    monkeypatch.setattr(sys, "argv", ["siamstream", *line.split()])
    with pytest.raises(SystemExit) as end:
        siamstream.cli.main()
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())  # tyro frames what it says
    assert end.value.code == 2, said
    assert message in said
    assert "Traceback" not in said
    assert said.count("error:") <= 1
    out = Path(places["OUT"])
    left = [path for path in out.parent.glob("out*") if path.is_file() or any(path.iterdir())]
    assert [path for path in left if path.name != "out-embeddings"] == []  # which the next search uses


def test_every_command_after_training_is_tried() -> None:
    tried = {line.split()[0] for line, _ in CASES}
    assert set(COMMANDS) - tried == {"profile", "reproduce", "demo"}  # tests/tools has theirs


def test_a_run_folder_that_is_half_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model": 3}))
    for line in (f"report {tmp_path}", f"plot {tmp_path} {tmp_path / 'x.png'}", f"preview {tmp_path} {tmp_path}/x.png"):
        monkeypatch.setattr(sys, "argv", ["siamstream", *line.split()])
        with pytest.raises(SystemExit) as end:
            siamstream.cli.main()
        assert end.value.code == 2
        assert capsys.readouterr().err.startswith("error: ")
