"""Compare back ends' decoders for worker processes that keep torch out.

    with DecodeService() as service:
        ...                                # hand service.client to workers; call start_if_wanted() now and then
        client.fault(encoded)              # in a worker or thread

The decoders need torch and DALI, 2 s and 400 MB to import. One process imports them, once some image has to be
compared, and forks a child for each worker, which shares this memory. A decoder that crashes or hangs on a hostile
image takes only its child with it, and the image is refused by name.
"""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
import socket
import sys
import threading
import time
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge, wait
from multiprocessing.context import SpawnContext
from typing import Any, Protocol

from pipeline.common.errors import UserError
from pipeline.common.system import dali_installed

START_S = 180.0  # for importing torch and DALI on a busy machine
DECODE_S = 60.0  # for one image by all decoders; 100 million pixels take about 3 s
_RETRY_S = 0.05


class Decoders(Protocol):
    """Compares the back ends' decoders."""

    def fault(self, encoded: bytes) -> str | None:
        """Why an image cannot be used on every installed back end; None if it can."""


class OwnDecoders:
    """Decoders in this process, opened when first used."""

    def __init__(self) -> None:
        self._comparison: Any = None
        self._lock = threading.Lock()

    def fault(self, encoded: bytes) -> str | None:
        """Why an image cannot be used on every installed back end; None if it can."""
        if not dali_installed():
            return None
        with self._lock:
            if self._comparison is None:
                from pipeline.backends.compare import BackendComparison  # here: it imports torch

                self._comparison = BackendComparison()
            return self._comparison.fault(encoded)

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]


class DecodeClient:
    """Sends images to the service. Picklable into workers; every thread has a connection of its own."""

    def __init__(self, address: str, key: bytes, wanted: Any) -> None:
        """``wanted``: event that asks the owner of the service to start it."""
        self._address, self._key, self._wanted = address, key, wanted
        self._local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        """Connections stay in their process."""
        return {"_address": self._address, "_key": self._key, "_wanted": self._wanted}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _local=threading.local())

    def fault(self, encoded: bytes) -> str | None:
        """Why an image cannot be used on every installed back end; None if it can.

        An image is sent again after a crash: a child that was killed for another reason must not condemn it.
        """
        if not dali_installed():
            return None
        for _ in range(2):
            connection, pid = self._connected()
            try:
                connection.send_bytes(encoded)
                if not connection.poll(DECODE_S):
                    self._local.connected = None
                    os.kill(pid, signal.SIGKILL)
                    return f"decoding it takes longer than {DECODE_S:.0f} s"
                return connection.recv_bytes().decode() or None
            except (EOFError, OSError):
                self._local.connected = None
        return "a decoder crashes on it"

    def _connected(self) -> tuple[Connection, int]:
        """This thread's connection, and the process at its other end."""
        connected = getattr(self._local, "connected", None)
        if connected is None:
            connected = self._local.connected = self._connect()
        return connected

    def _connect(self) -> tuple[Connection, int]:
        self._wanted.set()
        end = time.monotonic() + START_S
        while True:
            plug = socket.socket(socket.AF_UNIX)
            try:
                plug.connect(self._address)
                connection = Connection(plug.detach())
                answer_challenge(connection, self._key)
                return connection, int(connection.recv_bytes())
            except (OSError, EOFError):
                plug.close()
                if time.monotonic() > end:
                    raise RuntimeError(f"the process that compares decoders did not start in {START_S:.0f} s") from None
                time.sleep(_RETRY_S)


class DecodeService:
    """Owner's side: starts the process when an image is to be compared, and ends it."""

    def __init__(self, context: SpawnContext | None = None) -> None:
        self._context = context or multiprocessing.get_context("spawn")
        self._address = f"\0siamstream-{secrets.token_hex(16)}"  # Linux's abstract names: no file remains
        self._key = secrets.token_bytes(32)
        self._wanted = self._context.Event()
        self._process: Any = None
        self.client = DecodeClient(self._address, self._key, self._wanted)

    def start_if_wanted(self) -> None:
        """Start the process if a client waits for it. Raises UserError or RuntimeError if it has ended by itself."""
        if self._process is None and self._wanted.is_set():
            self._process = self._context.Process(target=_serve, args=(self._address, self._key), daemon=True)
            self._process.start()
        elif self._process is not None and (code := self._process.exitcode) is not None:
            if code < 0:
                raise UserError(
                    f"the process that compares decoders was killed by signal {-code}, most likely for lack of memory: "
                    "run the same command again with fewer --workers"
                )
            raise RuntimeError(f"the process that compares decoders ended with code {code}")

    def __enter__(self) -> DecodeService:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.join()


def _serve(address: str, key: bytes) -> None:
    """Import the decoders, then fork a child for each connection, until the owner ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the owner handles Ctrl-C and ends this process
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are not waited for
    if sys.modules.get("torch", sys) is None:  # the owner's main module keeps torch out
        del sys.modules["torch"]
    import pipeline.backends.dali_backend  # noqa: F401  before forking, so that children share its memory
    from pipeline.backends.compare import BackendComparison

    owner = multiprocessing.parent_process()
    assert owner is not None
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(128)
        while owner.sentinel not in wait([listener, owner.sentinel]):
            plug, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _answer(Connection(plug.detach()), key, BackendComparison)
            plug.close()


def _answer(connection: Connection, key: bytes, comparison: Any) -> None:
    """Compare what a client sends until it leaves. Never returns."""
    try:
        deliver_challenge(connection, key)
        connection.send_bytes(str(os.getpid()).encode())
        decoders = comparison()
        while True:
            connection.send_bytes((decoders.fault(connection.recv_bytes()) or "").encode())
    except (EOFError, OSError, multiprocessing.AuthenticationError):
        os._exit(0)  # the client has left
    except BaseException:  # noqa: BLE001  printed; a child must not return into its parent's loop
        sys.excepthook(*sys.exc_info())
        os._exit(1)
