"""The lock of a folder among processes of one machine, and of machines to which flock does not carry."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.common import locks
from pipeline.common.errors import UserError
from pipeline.common.locks import exclusive_lock

BEAT_S = 0.2  # in the tests
HOLDER = f"""
import errno, fcntl, socket, sys, time
from pathlib import Path
from pipeline.common import locks
from pipeline.common.errors import UserError

path, host, flock, shared = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] == "shared"
locks.BEAT_S = {BEAT_S}
socket.gethostname = lambda: host
if flock == "local":  # each machine grants it without asking the others
    fcntl.flock = lambda file, operation: None
if flock == "missing":
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")
    fcntl.flock = refuse
try:
    with locks.exclusive_lock(path, shared=shared, folder=path.parent) as lock:
        print("holds", flush=True)
        for line in sys.stdin:
            if line == "end\\n":
                break
            lock.check()
            print("still holds", flush=True)
except UserError as error:
    print("refused:", error, flush=True)
"""


class Holder:
    """A process that takes the lock and does as it is told; the first line that it prints says whether it has it."""

    def __init__(self, path: Path, host: str, flock: str, shared: bool = False) -> None:
        words = [sys.executable, "-c", HOLDER, str(path), host, flock, "shared" if shared else "alone"]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, word: str = "still?") -> None:
        assert self.process.stdin is not None
        print(word, file=self.process.stdin, flush=True)

    def end(self, number: int | None = None) -> None:
        if number is None:
            self.ask("end")
        else:
            self.process.send_signal(number)
        self.process.wait(timeout=60)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Holder]]:
    """Start a holder of the same lock: start(host, flock)."""
    started: list[Holder] = []

    def start(host: str, flock: str, **more: Any) -> Holder:
        started.append(Holder(tmp_path / "run.lock", host, flock, **more))
        return started[-1]

    yield start
    for holder in started:
        holder.process.kill()
        holder.process.communicate()


@pytest.mark.parametrize("flock", ["works", "local", "missing"])
def test_a_second_machine_is_refused_while_the_first_lives(start: Callable[..., Holder], flock: str) -> None:
    first = start("alpha", flock)
    assert first.says() == "holds"
    refused = start("beta", flock).says()
    pid = first.process.pid
    assert re.fullmatch(rf"refused: -c \(process {pid} on alpha, since \S+ \S+\) is writing to \S+: wait.*", refused)
    first.ask()
    assert first.says() == "still holds"


@pytest.mark.parametrize("flock", ["works", "local", "missing"])
def test_a_dead_machine_is_taken_over_after_its_beats(start: Callable[..., Holder], flock: str) -> None:
    first = start("alpha", flock)
    assert first.says() == "holds"
    first.end(signal.SIGKILL)
    killed = time.monotonic()
    second = start("beta", flock)
    assert second.says() == "holds"
    # Not before the silence is long enough; the first may have touched its file up to a beat before its death
    assert time.monotonic() - killed > BEAT_S * (locks.SILENT_BEATS - 1.5)
    second.end(signal.SIGKILL)
    assert second.process.stderr is not None
    assert "may still be writing to" in second.process.stderr.read()


def test_a_long_silence_is_not_waited_for(start: Callable[..., Holder], tmp_path: Path) -> None:
    first = start("alpha", "local")
    assert first.says() == "holds"
    first.end(signal.SIGKILL)
    os.utime(tmp_path / "run.lock", (time.time() - 3600,) * 2)
    second = start("beta", "local")
    assert second.says() == "holds"
    second.end()
    assert second.process.stderr is not None
    assert second.process.stderr.read() == ""


@pytest.mark.parametrize(("flock", "number"), [("works", signal.SIGKILL), ("missing", signal.SIGKILL), ("local", None)])
def test_nobody_waits_for_a_dead_process_of_the_same_machine_or_one_that_has_ended(
    start: Callable[..., Holder], flock: str, number: int | None
) -> None:
    first = start("alpha", flock)
    assert first.says() == "holds"
    first.end(number)
    second = start("alpha" if number else "beta", flock)
    assert second.says() == "holds"
    second.end()
    assert second.process.stderr is not None
    assert "may still be writing" not in second.process.stderr.read()


def test_a_stopped_holder_that_was_taken_over_stops_when_it_wakes(start: Callable[..., Holder]) -> None:
    first = start("alpha", "local")
    assert first.says() == "holds"
    first.process.send_signal(signal.SIGSTOP)
    second = start("beta", "local")
    assert second.says() == "holds"
    first.process.send_signal(signal.SIGCONT)
    time.sleep(3 * BEAT_S)
    first.ask()
    told = first.says()
    assert f"(process {second.process.pid} on beta, " in told
    assert "has taken over" in told
    second.ask()
    assert second.says() == "still holds"


@pytest.mark.parametrize("flock", ["works", "local"])
def test_parts_share_a_lock_and_keep_others_out(start: Callable[..., Holder], flock: str) -> None:
    parts = [start(host, flock, shared=True) for host in ("alpha", "beta")]
    assert [part.says() for part in parts] == ["holds", "holds"]
    assert "is writing to" in start("gamma", flock).says()
    parts[1].end()
    for host in ("beta", "gamma"):  # also on the machine of the part that has ended
        assert re.search(r"on alpha, .* is writing to", start(host, flock).says())
    parts[0].end()
    last = start("gamma", flock)
    assert last.says() == "holds"
    last.end()
    assert last.process.stderr is not None
    assert "may still be writing" not in last.process.stderr.read()


def test_parts_that_start_at_the_same_time_are_all_known(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    path.touch()
    with contextlib.ExitStack() as stack:
        # All have opened and looked before the first writes its name
        files = [stack.enter_context(locks._open_regular(path)) for _ in range(4)]
        held = [locks.FolderLock(path, file, shared=True, folder=tmp_path) for file in files]
        assert len(locks._holders(path.read_bytes())) == 4
        for left, lock in enumerate(held, start=1):
            lock.release()
            assert len(locks._holders(path.read_bytes())) == 4 - left


def test_a_part_takes_over_from_a_dead_process_that_was_alone(start: Callable[..., Holder], tmp_path: Path) -> None:
    first = start("alpha", "local")
    assert first.says() == "holds"
    first.end(signal.SIGKILL)
    parts = [start("beta", "local", shared=True)]
    assert parts[0].says() == "holds"
    parts.append(start("gamma", "local", shared=True))
    assert parts[1].says() == "holds"
    for part in parts:
        part.end()
    assert locks._holders((tmp_path / "run.lock").read_bytes()) == []


@pytest.mark.parametrize("what", ["deleted", "moved", "made anew"])
def test_a_folder_that_goes_away_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr(locks, "BEAT_S", 0.05)
    folder = tmp_path / "run"
    folder.mkdir()
    with exclusive_lock(folder / "run.lock", shared=False, folder=folder) as lock:
        lock.check()
        if what == "moved":
            folder.rename(tmp_path / "elsewhere")
        else:
            shutil.rmtree(folder)
        if what == "made anew":
            folder.mkdir()
            (folder / "run.lock").touch()
        time.sleep(0.5)
        assert lock.is_lost
        with pytest.raises(UserError, match=r"run or its run.lock was deleted or moved.*this process stops"):
            lock.check()


KINDS: dict[str, Callable[[Path], None]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a link to a file": lambda path: path.symlink_to(path.with_name("precious")),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_no_lock(tmp_path: Path, kind: str) -> None:
    (tmp_path / "precious").write_text("kept")
    KINDS[kind](tmp_path / "run.lock")
    with (
        pytest.raises(UserError, match="is no regular file, but it is where a lock is kept"),
        exclusive_lock(tmp_path / "run.lock", shared=False),
    ):
        pass
    assert (tmp_path / "precious").read_text() == "kept"


NO_HOLDERS = {
    "nothing": b"",
    "one line, as an older version wrote": b"train.py (process 1 on alpha)",
    "no text": b"\xff\0\n{",
    "another type": b"x\n[]\n",
    "too deep": b"x\n" + b"[" * 60_000,
    "odd fields": b'x\n{"machine": null, "pid": 1, "shared": 1}\n',
}


@pytest.mark.parametrize("kind", NO_HOLDERS)
def test_any_lock_file_that_nobody_holds_is_taken(tmp_path: Path, kind: str) -> None:
    (tmp_path / "run.lock").write_bytes(NO_HOLDERS[kind])
    with exclusive_lock(tmp_path / "run.lock", shared=False) as lock:
        lock.check()
    assert (tmp_path / "run.lock").read_bytes() == b""
