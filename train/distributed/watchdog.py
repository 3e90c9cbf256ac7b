"""Notice a run that makes no progress: which rank hangs, at what, and which ranks wait for it.

A thread of each process writes a note into the rendezvous' store every few seconds: what the main thread is doing, for
how long, and how many times it has waited for the others. A run hangs when no rank has gone on to anything else for
--hang-timeout. Every process then prints which ranks are behind and exits with ``EXIT_HANG``, so that torchrun or the
queue can start again. As long as one rank makes progress, however slowly, the others may wait for it.

The same thread passes a signal that reached one rank on to the others.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Protocol

import torch.distributed as td

from pipeline.common.errors import UserError
from pipeline.common.system import duration
from train.distributed.collectives import on_rank0
from train.distributed.process_group import DistContext
from train.distributed.stop_signals import StopRequest

EXIT_HANG = 70  # sysexits.h EX_SOFTWARE
MAX_INTERVAL_S = 2.0  # between two notes of a rank
READINGS = 4  # notes read one interval after the other; a rank whose note is the same in all of them is silent
RANKS_NAMED = 8
GRACE_S = 5.0  # rank 0, whose process may hold the store, leaves so much later than the others


def parse_hang_timeout(text: str) -> float:
    """``10m``, ``90s`` or ``2h`` in seconds; infinity for ``off``. Raises UserError for anything else."""
    if text == "off":
        return math.inf
    match = re.fullmatch(r"(\d{1,15})([smh])", text)
    if match is None or int(match[1]) == 0:
        raise UserError(f"--hang-timeout {text!r}: write seconds as 90s, minutes as 10m, hours as 2h, or off")
    return int(match[1]) * {"s": 1.0, "m": 60.0, "h": 3600.0}[match[2]]


def describe_limit(timeout: str, at_least_s: float) -> str:
    """The limit that holds, for people: ``--hang-timeout``, or the time that a remote dataset may take if longer."""
    if at_least_s <= parse_hang_timeout(timeout):
        return f"--hang-timeout {timeout}"
    return f"after {duration(at_least_s)}; --hang-timeout {timeout} is shorter than fetching images may take"


@dataclass(frozen=True)
class Note:
    """What a rank says of itself."""

    host: str
    pid: int
    beat: int  # grows with every note
    what: str
    waiting: bool
    waits: int
    age_s: float

    def __str__(self) -> str:
        return f"{self.age_s:.0f} s in: {self.what}"


class Board(Protocol):
    """Where the ranks leave their notes."""

    def post(self, rank: int, note: Note) -> None:
        """Replace the note of ``rank``."""

    def read(self) -> list[Note | None]:
        """The notes of all ranks; None where there is none yet."""

    def ask_to_stop(self, reason: str) -> None:
        """Tell all ranks to stop."""

    def stop_reason(self) -> str | None:
        """The note of one rank."""


class StoreBoard:
    """In the rendezvous' store, under a name that only the processes of this start know."""

    def __init__(self, store: td.Store, name: str, world_size: int) -> None:
        """Has a connection of its own: the main thread may be waiting on the other one."""
        self._store = td.PrefixStore(name, store.clone())
        self._keys = [f"rank {rank}" for rank in range(world_size)]

    def post(self, rank: int, note: Note) -> None:
        self._store.set(self._keys[rank], json.dumps(asdict(note)))

    def read(self) -> list[Note | None]:
        """The notes of all ranks; None where there is none yet."""
        there = [key for key in self._keys if self._store.check([key])]
        texts = dict(zip(there, self._store.multi_get(there) if there else [], strict=True))
        return [Note(**json.loads(texts[key])) if key in texts else None for key in self._keys]

    def ask_to_stop(self, reason: str) -> None:
        self._store.set("stop", reason)

    def stop_reason(self) -> str | None:
        return self._store.get("stop").decode() if self._store.check(["stop"]) else None


class OwnBoard:
    """For a single process."""

    def __init__(self) -> None:
        self._note: Note | None = None

    def post(self, rank: int, note: Note) -> None:
        self._note = note

    def read(self) -> list[Note | None]:
        return [self._note]

    def ask_to_stop(self, reason: str) -> None:
        """There is nobody to tell."""

    def stop_reason(self) -> str | None:
        return None


@dataclass(frozen=True)
class Hang:
    """A run that does not go on."""

    notes: tuple[Note | None, ...]
    silent: frozenset[int]  # ranks whose process leaves no notes any more
    behind: frozenset[int]  # ranks that the others wait for; none if all wait in the same place

    def __str__(self) -> str:
        """One line that names who hangs, and at what."""
        culprits = sorted(self.silent | self.behind)
        if not culprits:
            first = self.notes[0]
            return f"all {len(self.notes)} ranks wait for each other, {first}: a device or the network does not answer"
        named = "; ".join(self._describe(rank) for rank in culprits[:RANKS_NAMED])
        if len(culprits) > RANKS_NAMED:
            named += f"; and {len(culprits) - RANKS_NAMED} more"
        waiting = [rank for rank in range(len(self.notes)) if rank not in culprits]
        if not waiting:
            return named
        others = f" ({len(waiting)} ranks wait)" if len(waiting) > 1 else ""
        return f"{named}. Rank {waiting[0]} waits for it, {self.notes[waiting[0]]}{others}"

    def _describe(self, rank: int) -> str:
        note = self.notes[rank]
        if note is None:
            return f"rank {rank} has never begun"
        where = f"rank {rank} (host {note.host}, process {note.pid})"
        if rank in self.silent:
            return f"{where} leaves no notes any more, it is stopped or its machine is gone; the last one: {note.what}"
        return f"{where} does not go on, {note}"


def find_hang(readings: list[list[Note | None]], limit_s: float) -> Hang | None:
    """Judge notes that were read several times, with pauses in which every living rank writes a new one.

    None while any rank goes on, if slowly.
    """
    newest = readings[-1]
    silent = {rank for rank, note in enumerate(newest) if all(reading[rank] == note for reading in readings)}
    alive = {rank: note for rank, note in enumerate(newest) if note is not None and rank not in silent}
    if any(note.age_s < limit_s for note in alive.values()):
        return None
    furthest = max((note.waits for note in alive.values()), default=0)
    behind = {rank for rank, note in alive.items() if note.waits < furthest}
    behind = behind or {rank for rank, note in alive.items() if not note.waiting}
    return Hang(tuple(newest), frozenset(silent), frozenset(behind - silent))


class HangWatch:
    """The thread of one process."""

    def __init__(
        self, dist: DistContext, board: Board, limit_s: float, stop: StopRequest, leave: Callable[[str, bool], None]
    ) -> None:
        """``leave(message, guilty)`` ends the process; ``guilty``: it is this one that hangs."""
        self._dist, self._board, self._limit_s, self._stop, self._leave = dist, board, limit_s, stop, leave
        self._interval_s = min(MAX_INTERVAL_S, limit_s / 10)
        self._readings: deque[list[Note | None]] = deque(maxlen=READINGS)
        self._beat, self._told, self._left = 0, False, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)

    def start(self) -> None:
        """Leave the first note and start the thread."""
        self.look()
        self._thread.start()

    def end(self) -> None:
        self._left.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._left.wait(self._interval_s):
            try:
                self.look()
            except RuntimeError as error:  # of the store: its process is gone, or too busy
                if self._dist.status.age_s() > self._limit_s:
                    words = f"rank {self._dist.rank} does not go on, {self._own_note()}"
                    self._leave(f"{words}; the rendezvous' store does not answer: {error}", True)

    def look(self) -> None:
        """Leave a note, look for signals, and judge. Once every interval."""
        self._beat += 1
        self._board.post(self._dist.rank, self._own_note())
        self._pass_on_signals()
        if self._dist.status.age_s() < self._limit_s:
            self._readings.clear()
            return
        self._readings.append(self._board.read())
        hang = find_hang(list(self._readings), self._limit_s) if len(self._readings) == READINGS else None
        if hang is not None:
            self._leave(str(hang), self._dist.rank in hang.behind)

    def _own_note(self) -> Note:
        doing = self._dist.status.now
        age_s = self._dist.status.age_s()
        return Note(socket.gethostname(), os.getpid(), self._beat, doing.what, doing.waiting, doing.waits, age_s)

    def _pass_on_signals(self) -> None:
        if self._stop and not self._told:
            self._board.ask_to_stop(f"{self._stop.signal_name} on rank {self._dist.rank}")
            self._told = True
        elif not self._stop and (reason := self._board.stop_reason()) is not None:
            self._stop.note(reason)


@contextmanager
def hangs_watched(dist: DistContext, timeout: str, stop: StopRequest, at_least_s: float = 0.0) -> Iterator[None]:
    """Watch while the context lasts; ``at_least_s`` seconds without a step are no hang, whatever ``timeout`` says.

    Raises SharedError for a wrong ``timeout``. A collective.
    """
    limit_s = max(on_rank0(dist, lambda: parse_hang_timeout(timeout)), at_least_s)
    board: Board = OwnBoard()
    if dist.store is not None:
        name = on_rank0(dist, lambda: secrets.token_hex(8))  # notes of processes that were restarted must not count
        board = StoreBoard(dist.store, name, dist.world_size)

    def leave(message: str, guilty: bool) -> None:
        if guilty:
            faulthandler.dump_traceback(sys.stderr)  # where each thread of this process is
        print(
            f"error: {message} ({describe_limit(timeout, at_least_s)}; reported by rank {dist.rank})", file=sys.stderr
        )
        sys.stdout.flush(), sys.stderr.flush()
        if dist.is_main and dist.world_size > 1:
            time.sleep(GRACE_S)
        os._exit(EXIT_HANG)

    watch = HangWatch(dist, board, limit_s, stop, leave)
    watch.start()
    try:
        yield
    finally:
        watch.end()
