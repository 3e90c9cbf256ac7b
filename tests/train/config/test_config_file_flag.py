"""--config, --print-config and --dry-run: a file over the recipe, flags over the file, nothing trained or written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipeline.common.errors import UserError
from tests.train.test_pretrain import CPU, run_here
from train.config.recipes import parse_config

PLACES = ["--data", "d", "--run-dir", "r"]


def written(folder: Path, text: str, name: str = "settings.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


DIGITS = "9" * 5000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: &a [*a]", "aliases"),
        ("a: &a [1, 1]\nb: [*a, *a]", "aliases"),
        ("data: !!binary aGVsbG8=", "which is no path"),
        ("data: !!set {a, b}", "which is no path"),
        ('data: "a\\ud800b"', "no file or folder has such a character"),
        (f"optim: {{base_lr: {DIGITS[:400]}}}", "which is no number"),
        (f"epochs: {DIGITS}", "is no YAML"),
        (f"checkpoint_every: {DIGITS}m", "--checkpoint-every"),
        (f"hang_timeout: {DIGITS}h", "--hang-timeout"),
        (f"loader: {{cache: {{cache_size: {DIGITS}GB}}}}", "--cache-size"),
        (f"model: {{dim: {2**63}}}", "--dim"),
        ("data: " + "[" * 300 + "]" * 300, "which is no path"),
        ("data: " + "[" * 5000, "is no YAML"),
    ],
)
def test_odd_values_are_one_message(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, text)
    assert run_here(monkeypatch, ["--data", "d", "--run-dir", str(tmp_path / "r"), "--config", file]) == 2
    shown = capfd.readouterr().err
    assert shown.count("error: ") == 1
    assert message in shown


@pytest.mark.parametrize("place", ["data", "epochs", "method", "run_dir", "nonsense", "knn.data", "views.image_size"])
@pytest.mark.parametrize("end", ["", "\n  - [", "\n}"])
def test_a_password_in_the_wrong_line_is_not_shown(
    place: str, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    outer, _, inner = place.rpartition(".")
    line = f"{inner}: S3:/reader:pa55w0rd-of-mine@bucket/x?sig=s1gnature-of-mine{end}"
    text = f"{outer}:\n  {line}" if outer else line
    assert run_here(monkeypatch, ["--run-dir", str(tmp_path / "r"), "--config", written(tmp_path, text)]) == 2
    shown = "".join(capfd.readouterr())
    assert "error: " in shown
    assert "pa55w0rd" not in shown
    assert "s1gnature" not in shown


@pytest.mark.parametrize("method", ["simsiam", "moco-v2", "swav", "dino"])
@pytest.mark.parametrize("recipe", [None, "imagenet-100ep", "demo"])
def test_what_is_printed_reads_back_as_the_same_run(
    method: str, recipe: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--method",
        method,
        *(["--recipe", recipe] if recipe else []),
        "--weight-decay",
        "1e-6",
        "--one-pass",
        "on",
    ]
    assert run_here(monkeypatch, [*words, "--print-config"]) == 0
    text = capsys.readouterr().out
    assert "run_dir" not in text
    again = parse_config([*PLACES, "--config", written(tmp_path, text)])
    assert again.as_json() == parse_config([*PLACES, *words]).as_json()
    as_json = written(tmp_path, json.dumps(parse_config([*PLACES, *words]).as_json()), "config.json")
    assert parse_config(["--config", as_json]).as_json() == again.as_json()


def test_flags_override_the_file_and_the_file_the_recipe(tmp_path: Path) -> None:
    file = written(tmp_path, "recipe: demo\nepochs: 7\noptim: {base_lr: 3e-1}\nhang_timeout: 10m\ndata: here\n")
    config = parse_config(["--config", file, "--run-dir", "r", "--epochs", "9", "--dim", "64"])
    assert (config.recipe, config.epochs, config.optim.base_lr, config.model.dim) == ("demo", 9, 0.3, 64)
    assert config.model.backbone == "resnet_tiny"  # the recipe's
    assert config.data == Path("here")


def test_yaml_values_are_what_they_look_like(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        "one_pass: off\nsync_bn: false\nviews:\n  crop_scale: [0.1, 1]\n  more_views:\n  - {count: 6, image_size: 96}\n"
        "optim: {weight_decay: 1e-4}\nmax_steps: null\ncheckpoint_every: 90m\n",
    )
    config = parse_config([*PLACES, "--config", file])
    assert (config.one_pass, config.sync_bn, config.optim.weight_decay) == ("off", False, 1e-4)
    assert config.views.crop_scale == (0.1, 1.0)
    assert (config.views.more_views[0].count, config.views.more_views[0].image_size) == (6, 96)
    assert (config.max_steps, config.checkpoint_every) == (None, "90m")


@pytest.fixture(scope="module")
def finished(photo_dataset_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("config") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert run_here(patch, tiny(photo_dataset_path, run_dir)) == 0
    return run_dir


def tiny(data: Path, run_dir: Path) -> list[str]:
    short = ["--global-batch", "12", "--max-steps", "2", "--knn-every", "0", "--log", "none"]
    return ["--data", str(data), "--run-dir", str(run_dir), *CPU, *short]


def test_a_runs_own_file_repeats_it(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again = ["--config", str(finished / "config.json"), "--run-dir", str(tmp_path / "again")]
    assert run_here(monkeypatch, again) == 0
    lines = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (finished, tmp_path / "again")
    ]
    assert lines[0] == lines[1]


def test_a_file_that_disagrees_with_the_run_to_resume_is_named(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, "optim: {base_lr: 0.7}\n")
    assert run_here(monkeypatch, ["--resume", "--run-dir", str(finished), "--config", file]) == 2
    assert "0.7" in capsys.readouterr().err


def test_a_dry_run_says_what_is_needed_and_leaves_no_file(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(monkeypatch, [*tiny(photo_dataset_path, tmp_path / "run"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "steps        400 = 100 epochs x 4" in said
    assert re.search(r"disk +[\d.]+ MB in --run-dir: 3 \+ 1 checkpoints of [\d.]+ MB.* are free\n", said)
    assert re.search(r"cache +none: the dataset is on a disk; \d+ kB are read in each epoch", said)
    assert re.search(r"memory +about \d+ MB of memory .* activations \d+ MB", said)
    assert "nothing was written" in said
    assert list(tmp_path.iterdir()) == []


def test_more_images_in_a_pass_need_more_memory_and_smaller_passes_less(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = []
    for more in ([], ["--accumulate", "2"], ["--image-size", "32"]):
        assert run_here(monkeypatch, [*tiny(photo_dataset_path, tmp_path / "run"), "--dry-run", *more]) == 0
        found = re.search(r"activations (\d+) (kB|MB)", capsys.readouterr().out)
        assert found is not None
        kept.append(int(found[1]) * {"kB": 1, "MB": 1000}[found[2]])
    assert kept[1] == pytest.approx(kept[0] / 2, rel=0.2)
    assert kept[2] > 2 * kept[0]


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("epochs: many", "a.yaml", 'has epochs "many", which is no whole number'),
        ("epoch: 3", "a.yaml", "has epoch, which is no setting of a run: did you mean epochs?"),
        ("base_lr: 0.1", "a.yaml", "has base_lr, which is no setting of a run: write it inside optim"),
        ("optim: 3", "a.yaml", "has optim 3, which has settings of its own"),
        ("epochs: 3\nepochs: 4", "a.yaml", "'epochs' is given twice"),
        ("a: [", "a.yml", "is no YAML"),
        ("{", "a.json", "is no JSON"),
        ("- 1", "a.yaml", "holds no object with settings"),
        ("", "a.yaml", "holds no object with settings"),
        ("epochs: 0", "a.yaml", "--epochs 0: it must be at least 1"),
        ("optim: {base_lr: .nan}", "a.yaml", "--base-lr nan: it must be above 0"),
        ("method: simsam", "a.yaml", "simsam"),
        ("recipe: tiny", "a.yaml", 'has recipe "tiny", which is no'),
        ("data: https://host/x?***", "a.yaml", "holds no passwords"),
    ],
)
def test_a_wrong_file_is_one_message(text: str, name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        parse_config([*PLACES, "--config", written(tmp_path, text, name)])
    assert message in str(error.value)


def test_a_missing_file_and_two_methods_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.yaml cannot be read \(No such file"):
        parse_config([*PLACES, "--config", str(tmp_path / "nowhere.yaml")])
    with pytest.raises(UserError, match="cannot be read"):
        parse_config([*PLACES, "--config", str(tmp_path)])
    file = written(tmp_path, "method: byol")
    with pytest.raises(UserError, match=r"--method simclr, but .* has method byol"):
        parse_config([*PLACES, "--config", file, "--method", "simclr"])
