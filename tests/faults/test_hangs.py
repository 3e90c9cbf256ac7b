"""A run that does not go on: who is to blame is judged from the ranks' notes, and told by the processes themselves."""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.common.errors import UserError
from tests.train.test_pretrain import ROOT, flags
from train.distributed.process_group import DistContext, RankStatus
from train.distributed.stop_signals import StopRequest
from train.distributed.watchdog import (
    EXIT_HANG,
    READINGS,
    HangWatch,
    Note,
    describe_limit,
    find_hang,
    parse_hang_timeout,
)

LOADER = Note("a", 7, 0, "step 5: waiting for the loader", waiting=False, waits=20, age_s=61)
GRADIENTS = Note("b", 8, 0, "step 5: averaging gradients", waiting=True, waits=21, age_s=60)


def readings(*notes: Note, silent: tuple[int, ...] = ()) -> list[list[Note | None]]:
    return [
        [replace(note, beat=0 if rank in silent else beat) for rank, note in enumerate(notes)]
        for beat in range(READINGS)
    ]


def test_the_rank_that_did_not_come_so_far_is_named() -> None:
    hang = find_hang(readings(GRADIENTS, LOADER, GRADIENTS), 60)
    assert hang is not None
    assert hang.behind == {1}
    earlier = find_hang(readings(GRADIENTS, replace(LOADER, waiting=True)), 60)
    assert earlier is not None
    assert earlier.behind == {1}
    assert str(hang) == (
        "rank 1 (host a, process 7) does not go on, 61 s in: step 5: waiting for the loader. "
        "Rank 0 waits for it, 60 s in: step 5: averaging gradients (2 ranks wait)"
    )


def test_a_rank_that_goes_on_is_waited_for() -> None:
    slow = replace(LOADER, age_s=3)
    assert find_hang(readings(GRADIENTS, slow), 60) is None
    assert find_hang(readings(GRADIENTS, LOADER), 62) is None


def test_a_silent_rank_is_named_and_its_last_words_do_not_count() -> None:
    hang = find_hang(readings(GRADIENTS, replace(LOADER, age_s=1), silent=(1,)), 60)
    assert hang is not None
    assert (hang.silent, hang.behind) == ({1}, set())
    assert "rank 1 (host a, process 7) leaves no notes any more" in str(hang)


def test_the_limit_that_holds_is_told() -> None:
    assert describe_limit("10m", 0.0) == "--hang-timeout 10m"
    assert describe_limit("off", 2100.0) == "--hang-timeout off"
    assert describe_limit("10m", 2100.0).startswith("after 35 min 00 s; --hang-timeout 10m is shorter")


def test_a_rank_that_never_began_is_silent() -> None:
    hang = find_hang([[GRADIENTS, None], [replace(GRADIENTS, beat=1), None]], 60)
    assert hang is not None
    assert "rank 1 has never begun" in str(hang)


def test_work_before_the_same_wait_is_to_blame_and_else_nobody() -> None:
    on_rank0 = replace(LOADER, waits=21)
    hang = find_hang(readings(on_rank0, GRADIENTS), 60)
    assert hang is not None
    assert hang.behind == {0}
    all_wait = find_hang(readings(GRADIENTS, GRADIENTS), 60)
    assert all_wait is not None
    assert str(all_wait).startswith("all 2 ranks wait for each other, 60 s in: step 5")


class FakeBoard:
    """Two ranks; the other one writes itself."""

    def __init__(self) -> None:
        self.notes: list[Note | None] = [None, None]
        self.reason: str | None = None

    def post(self, rank: int, note: Note) -> None:
        self.notes[rank] = note

    def read(self) -> list[Note | None]:
        return list(self.notes)

    def ask_to_stop(self, reason: str) -> None:
        self.reason = reason

    def stop_reason(self) -> str | None:
        return self.reason


def watch(
    now: list[float], board: FakeBoard, rank: int, stop: StopRequest, said: list[tuple[str, bool]]
) -> tuple[HangWatch, RankStatus]:
    status = RankStatus(clock=lambda: now[0])
    dist = DistContext(rank, 2, rank, 2, torch.device("cpu"), status=status)
    return HangWatch(dist, board, 60.0, stop, lambda *told: said.append(told)), status


def test_a_watch_leaves_only_when_nobody_goes_on() -> None:
    now, board, said = [0.0], FakeBoard(), list[tuple[str, bool]]()
    first, status = watch(now, board, 0, StopRequest(), said)
    second, other = watch(now, board, 1, StopRequest(), said)

    def look_until(seconds: float) -> None:
        now[0] = seconds
        for _ in range(READINGS):
            second.look()
            first.look()

    status.wait("gradients")
    now[0] = 30.0
    other.work("loader, next batch")
    look_until(61.0)
    assert said == []
    look_until(91.0)
    assert [guilty for _, guilty in dict.fromkeys(said)] == [False, True]  # first the one that waits
    assert all("rank 1 (host" in message and "loader, next batch" in message for message, _ in said)
    said.clear()
    other.wait("gradients")
    look_until(92.0)
    assert said == []


def test_a_signal_on_one_rank_is_passed_on() -> None:
    now, board = [0.0], FakeBoard()
    asked, other = StopRequest("SIGTERM"), StopRequest()
    first, second = watch(now, board, 0, asked, [])[0], watch(now, board, 1, other, [])[0]
    second.look()
    assert not other
    first.look()
    second.look()
    assert other.signal_name == "SIGTERM on rank 0"


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("2h", 7200), ("off", math.inf)])
def test_timeouts(text: str, seconds: float) -> None:
    assert parse_hang_timeout(text) == seconds


@pytest.mark.parametrize("text", ["", "0m", "10", "-1m", "soon"])
def test_other_timeouts_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--hang-timeout"):
        parse_hang_timeout(text)


STUCK = """
import os, signal, sys, time
import train.openmp
from pipeline.common.errors import exit_on_user_error
from train import pretrain
from train.engine import loop as loop_module

step = loop_module.train_step

def loader_hangs(batches):
    for number, batch in enumerate(batches):
        if number == 2 and os.environ.get("RANK", "1") == "1":
            {how}
        yield batch

loop_module.train_step = lambda run, batches, kept={{}}: step(run, kept.setdefault(0, loader_hangs(batches)))
exit_on_user_error(pretrain.main)
"""
FOREVER = {
    "sleeps": "time.sleep(1000)",
    "is stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
}


def start(
    script: Path, arguments: list[str], tmp_path: Path, rank: int = 0, ranks: int = 1
) -> tuple[subprocess.Popen[bytes], Callable[[], str]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if ranks > 1:
        environment |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
        environment |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    log = tmp_path / f"log{rank}"
    with open(log, "wb") as file:
        process = subprocess.Popen([sys.executable, str(script), *arguments], env=environment, stdout=file, stderr=file)
    return process, log.read_text


PORT: list[int] = []


def free_port() -> int:
    """The same one for all ranks of a test."""
    if not PORT:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            PORT.append(probe.getsockname()[1])
    return PORT[0]


def stuck_script(tmp_path: Path, how: str) -> Path:
    script = tmp_path / "stuck.py"
    script.write_text(STUCK.format(how=FOREVER[how]))
    return script


@pytest.mark.faults
def test_a_loader_that_hangs_ends_a_single_process(photo_dataset_path: Path, tmp_path: Path) -> None:
    arguments = flags(photo_dataset_path, tmp_path / "run", "--hang-timeout", "15s", "--knn-every", "0")
    process, said = start(stuck_script(tmp_path, "sleeps"), arguments, tmp_path)
    assert process.wait(timeout=240) == EXIT_HANG, said()
    assert "rank 0 (host" in said()
    assert "in: step 3: waiting for the loader (--hang-timeout 15s; reported by rank 0)" in said()
    assert "in loader_hangs" in said()  # the stack of the main thread


@pytest.mark.faults
@pytest.mark.parametrize(
    ("how", "words"),
    [("sleeps", "does not go on, "), ("is stopped", "leaves no notes any more, it is stopped or its machine is gone")],
)
def test_a_rank_that_hangs_is_named_by_the_other(
    photo_dataset_path: Path, tmp_path: Path, how: str, words: str
) -> None:
    PORT.clear()
    arguments = flags(photo_dataset_path, tmp_path / "run", "--hang-timeout", "15s", "--knn-every", "0")
    script = stuck_script(tmp_path, how)
    (waiting, said), (stuck, own_words) = (start(script, arguments, tmp_path, rank, 2) for rank in (0, 1))
    try:
        assert waiting.wait(timeout=240) == EXIT_HANG, said()
        assert f"rank 1 (host {os.uname().nodename}, process {stuck.pid}) {words}" in said()
        assert re.search(r"\. Rank 0 waits for it, \d+ s in: step 3: forward, backward, averaging gradients", said())
        if how == "sleeps":
            assert "in: step 3: waiting for the loader. Rank 0" in said()
            assert stuck.wait(timeout=60) == EXIT_HANG
            assert "in loader_hangs" in own_words()
    finally:
        for process in (waiting, stuck):
            process.kill()
            process.wait()


def test_a_signal_while_waiting_for_another_process_ends_it(photo_dataset_path: Path, tmp_path: Path) -> None:
    """The main thread is inside torch, where no Python runs; rank 1 never comes."""
    PORT.clear()
    script = tmp_path / "alone.py"
    script.write_text(
        "import train.openmp, sys\nfrom train import pretrain\nfrom train.distributed import process_group as dist\n"
        "found = dist._fresh_store\n"
        "dist._fresh_store = lambda: print('meeting', flush=True) or found()\npretrain.main()\n"
    )
    process, said = start(script, flags(photo_dataset_path, tmp_path / "run"), tmp_path, 0, 2)
    while "meeting" not in said():
        assert process.poll() is None, said()
        os.sched_yield()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75, said()
    assert "stopped by SIGTERM before the first step" in said()
