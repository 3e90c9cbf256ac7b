"""What every script refuses before it begins: to be one checkout's while another one's code is imported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.common.errors import UserError, check_one_copy, exit_on_user_error
from pipeline.dataset.dataset import BadSampleError


def checkout(folder: Path, *, whole: bool = True) -> Path:
    for name in ("pipeline/common/errors.py", "tools/make_shards.py", *(["setup.py"] if whole else [])):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_a_script_of_another_checkout_is_refused(tmp_path: Path) -> None:
    one, other = checkout(tmp_path / "one"), checkout(tmp_path / "other")
    with pytest.raises(UserError, match=f"which is {one}: .*`pip install -e {other}`"):
        check_one_copy(other / "tools" / "make_shards.py", one)


def test_everything_else_is_not(tmp_path: Path) -> None:
    one, installed = checkout(tmp_path / "one"), checkout(tmp_path / "site-packages", whole=False)
    link = tmp_path / "link"
    link.symlink_to(one)
    users = tmp_path / "work" / "script.py"
    for script, imported in (
        (one / "tools" / "make_shards.py", one),
        (link / "tools" / "make_shards.py", one),
        (one / "tools" / "make_shards.py", installed),  # pip install, without -e
        (users, one),
        (Path("script.py"), one),
    ):
        check_one_copy(script, imported)


@pytest.mark.parametrize("name", ["\x1b[2J\x1b[31mred", "bell\a", "\u202egpj.exe", "lone \udcff byte", "back\rwards"])
def test_an_error_with_a_name_from_a_file_moves_no_cursor(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise UserError(f"cannot read {name}")

    with pytest.raises(SystemExit):
        exit_on_user_error(fail)
    shown = capsys.readouterr().err
    assert shown.startswith("error: cannot read ")
    assert shown.rstrip("\n").isprintable()
    assert str(BadSampleError(3, "shard-000000.tar", name, "gone")).isprintable()


@pytest.mark.parametrize("take", [lambda: torch.empty(1 << 58, dtype=torch.uint8), lambda: bytearray(1 << 62)])
def test_more_memory_than_the_machine_has_is_one_message(
    take: Callable[[], object], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        exit_on_user_error(lambda: take() and None)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: the memory of this machine is used up")


def test_another_runtime_error_is_shown_whole() -> None:
    with pytest.raises(RuntimeError, match="of this program"):
        exit_on_user_error(lambda: (_ for _ in ()).throw(RuntimeError("a fault of this program")))
