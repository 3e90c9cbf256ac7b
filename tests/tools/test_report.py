"""tools/report.py: one page that shows what a run holds, in a real browser where there is one."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import train.openmp  # noqa: F401
from tests.helpers.damage import change_bytes, copy_dataset
from tests.helpers.toy_runs import CPU, TINY, call
from tools import report
from train import pretrain

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def data(photo_dataset_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_dataset(photo_dataset_path, tmp_path_factory.mktemp("report") / "data")


@pytest.fixture(scope="module")
def run_dir(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "first run <b>"
    arguments = [
        "--data",
        str(data),
        "--run-dir",
        str(out),
        "--epochs",
        "2",
        "--global-batch",
        "12",
        "--log-every",
        "1",
    ]
    with pytest.MonkeyPatch.context() as patch:
        assert call(patch, pretrain, *arguments, *TINY, *CPU, "--backend", "torchvision") == 0
    return out


def write(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> str:
    assert call(monkeypatch, report, *arguments, "--out", str(out), "--backend", "torchvision", "--threads", "1") == 0
    return out.read_text()


class Balanced(html.parser.HTMLParser):
    """Fails on tags that do not match, and collects what the page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href") and not (value or "data:").startswith("data:"):
                self.fetched.append(str(value))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write(monkeypatch, tmp_path / "page.html", str(run_dir))
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert parser.fetched == []
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert f"<td>first run &lt;b&gt;: torch</td><td>{version('torch')}</td>" in text  # as the run recorded it
    assert 'alt="images and their views"' in text
    expected = ["Runs", "Curves", "Views", "Bad samples", "Map of embeddings", "Neighbours", "Confusion of kNN"]
    assert [heading for heading in headings if heading in expected] == expected
    assert text.count("<circle") == 48
    assert "<b>" not in text  # the run's name is shown as it is, and is no markup
    assert "first run &lt;b&gt;" in text


def test_two_runs_stand_side_by_side(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    shutil.copytree(run_dir, other)
    config = json.loads((other / "config.json").read_text())
    config["optim"]["base_lr"] = 0.125
    (other / "config.json").write_text(json.dumps(config))
    text = write(monkeypatch, tmp_path / "page.html", str(run_dir), str(other))
    assert "<td>optim.base_lr</td><td>0.05</td><td>0.125</td>" in text
    assert text.count('class="map"') == 2


def test_what_is_gone_is_said(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write(monkeypatch, tmp_path / "page.html", str(run_dir), "--data", str(tmp_path / "moved"))
    assert "Left out, as the dataset is not there" in text
    shutil.copytree(run_dir, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "checkpoints")
    (tmp_path / "bare" / "backbone.safetensors").unlink()
    text = write(monkeypatch, tmp_path / "page.html", str(tmp_path / "bare"))
    assert "Left out, as there is no encoder" in text
    assert "<circle" not in text


def test_bad_images_are_left_off_the_map(
    run_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt = copy_dataset(data, tmp_path / "spoilt")
    change_bytes(spoilt, [3, 4])
    assert write(monkeypatch, tmp_path / "page.html", str(run_dir), "--data", str(spoilt)).count("<circle") == 46


@pytest.mark.parametrize("arguments", [[], ["no-such-run"]])
def test_mistakes(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, report, *arguments) == 2
    assert "run folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "plan.json"])
@pytest.mark.parametrize("text", ["{}", '{"model": 3, "data": []}', "[]", "{", "9" * 5000])
def test_values_that_no_run_writes_are_one_message(
    name: str, text: str, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    copy = Path(shutil.copytree(run_dir, tmp_path / "run"))
    (copy / name).write_text(text)
    assert call(monkeypatch, report, copy) == 2
    assert f"error: {copy} cannot be read as a run folder" in capfd.readouterr().err


@pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt install chromium")
def test_a_browser_shows_it_without_errors_and_hovering_works(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert BROWSER is not None
    text = write(monkeypatch, tmp_path / "page.html", str(run_dir))
    hover = """
    <script>
    const errors = []; addEventListener('error', event => errors.push(event.message));
    addEventListener('load', () => {
      const dot = document.querySelector('circle[data-i="7"]'), box = dot.getBoundingClientRect();
      const at = {clientX: box.x + box.width / 2, clientY: box.y + box.height / 2, bubbles: true};
      dot.dispatchEvent(new PointerEvent('pointermove', at));
      const tip = document.querySelector('.tip');
      document.title = JSON.stringify({errors, hidden: tip.hidden, name: tip.querySelector('span').textContent,
        width: tip.querySelector('img').src.length, dot: dot.querySelector('title').textContent});
    });
    </script>"""
    (tmp_path / "hovered.html").write_text(text.replace("<head>", "<head>" + hover, 1))
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run(
        [*command, f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "hovered.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=240,
    )
    found = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert found, done.stderr
    seen = json.loads(html.unescape(found[1]))
    assert seen["errors"] == []
    assert not seen["hidden"]
    assert seen["name"] == seen["dot"]
    assert seen["width"] > 300
