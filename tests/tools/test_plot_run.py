"""The plot of a run: what is read from the folder, what is drawn, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pipeline.common.errors import UserError
from tools.plot_run import draw
from train.storage.run_folder import read_run

SCRIPT = Path(__file__).parents[2] / "tools" / "plot_run.py"


def write_run(folder: Path, knn: bool = True, steps: int = 40) -> Path:
    """A run folder with a line every 10 steps and an evaluation every 20, of 20 steps an epoch."""
    folder.mkdir(parents=True)
    data = folder.parent / "data"
    data.mkdir(exist_ok=True)
    (data / "dataset.json").write_text(json.dumps({"classes": list("abcd")}))
    config = {"data": str(data), "model": {"backbone": "resnet_tiny", "dim": 64}, "views": {"image_size": 32}}
    plan = {"global_batch": 8, "num_samples": 160, "steps_per_epoch": 20}
    lines = []
    for step in range(0, steps + 1, 10):
        if step:
            lines.append({"epoch": (step - 1) // 20, "step": step, "loss": -step / 100, "z_std": 0.12, "lr": 0.1})
        if knn and step % 20 == 0:
            lines.append({"epoch": step // 20, "step": step, "knn_top1": 30.0 + step})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_reads_steps_and_evaluations_apart(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    assert (run.steps, run.loss) == ((10, 20, 30, 40), (-0.1, -0.2, -0.3, -0.4))
    assert (run.knn_steps, run.knn_top1) == ((0, 20, 40), (30.0, 50.0, 70.0))
    assert (run.dim, run.classes, run.steps_per_epoch) == (64, 4, 20)


def test_a_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 2, "step": 50, "lo')
    assert read_run(folder).steps == (10, 20, 30, 40)


def test_panels_show_the_curves_the_healthy_line_and_chance(tmp_path: Path) -> None:
    loss, std, knn = draw(read_run(write_run(tmp_path / "run"))).axes
    assert list(loss.lines[0].get_ydata()) == [-0.1, -0.2, -0.3, -0.4]
    assert list(std.lines[0].get_ydata()) == [1 / 8, 1 / 8]  # 1/sqrt(64)
    assert list(knn.lines[0].get_xdata()) == [0, 20, 40]
    assert list(knn.lines[1].get_ydata()) == [25, 25]  # four classes
    assert "untrained 30.0 %" in knn.get_title(loc="right")
    assert all(axes.get_ylabel() for axes in (loss, std, knn))


def test_without_labels_the_third_panel_says_so(tmp_path: Path) -> None:
    knn = draw(read_run(write_run(tmp_path / "run", knn=False))).axes[2]
    assert not knn.lines
    assert "no kNN" in knn.texts[0].get_text()


def test_other_methods_have_a_loss_above_0_and_a_line_for_one_that_is_stuck(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "method": "simclr"}))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 2, "step": 50, "loss": 2.5, "z_std": 0.1, "stuck_loss": 4.0}\n')
    figure = draw(read_run(folder))
    loss = figure.axes[0]
    assert list(loss.lines[1].get_ydata()) == [4.0, 4.0]
    assert loss.get_ylim() == (0, 4.2)
    assert "cosine" not in loss.get_ylabel()
    assert figure.get_suptitle().startswith("simclr run")


def test_a_loss_that_is_not_a_number_does_not_stop_the_plot(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 2, "step": 50, "loss": NaN, "z_std": NaN}\n')
    loss = draw(read_run(folder)).axes[0]
    assert loss.get_ylim() == (-1.04, 0.04)


def test_the_command_writes_a_png(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    done = subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    image = Image.open(folder / "plot.png")
    assert image.format == "PNG"
    assert min(image.size) > 800


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"config.json": None}, "config.json is missing"),
        ({"plan.json": "{"}, "plan.json cannot be read"),
        ({"plan.json": "[1]"}, "not what train/pretrain.py writes"),
        ({"config.json": "{}"}, "no run folder that this version wrote"),
        ({"metrics.jsonl": "nonsense\n"}, "has no logged step yet"),
        ({"metrics.jsonl": ""}, "no logged step yet"),
        ({"metrics.jsonl": None}, "no logged step yet"),
    ],
)
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, damage: dict[str, str | None], message: str) -> None:
    folder = write_run(tmp_path / "run")
    for name, text in damage.items():
        if text is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_run(folder)


def test_a_missing_folder_and_a_wrong_suffix_exit_with_2(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for arguments, message in (
        ([tmp_path / "nowhere"], "is no folder"),
        ([folder, tmp_path / "plot.gif"], "written as PNG"),
        ([folder, tmp_path / "nowhere" / "plot.png"], "cannot write"),
    ):
        done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
