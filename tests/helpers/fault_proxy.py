"""An HTTP proxy that injects faults, by a schedule that is a pure function of its seed and the requests."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = {
    "cut": "half of the body, then the end of the connection",
    "reset": "the connection is reset before the answer",
    "error 500": "an answer with status 500",
    "error 503": "an answer with status 503",
    "slow": "the body in 20 pieces with pauses",
    "stall": "half of the body, then silence until the client or the server gives up",
    "truncated": "half of the body, and a Content-Length that agrees with it",
    "wrong object": "as many bytes of another shard",
    "other length": "another shard's answer",
    "bit flip": "one bit in the middle of the body is another",
}
PAUSE_S = 0.005  # between the pieces of a slow body
ALL_FILES = r"/(dataset\.json|samples\.npy|shard-\d+\.tar) "
SHARDS = r"/shard-\d+\.tar "


@dataclass(frozen=True)
class Faults:
    """Which requests are struck, and how: a pure function of the request and of how often it has come."""

    kinds: tuple[str, ...] = ()
    share: float = 1.0  # of the requests that may be struck
    repeat: int | None = 1  # the same request is struck at most so often and then heals; None: it never does
    only: str = ALL_FILES  # a regular expression that `PATH RANGE` must contain
    seed: int = 0

    def strike(self, path: str, byte_range: str, occurrence: int) -> str | None:
        """The fault for a request's ``occurrence``-th time, counted from 0; None for an honest answer."""
        if not self.kinds or not re.search(self.only, f"{path} {byte_range}"):
            return None
        if self.repeat is not None and occurrence >= self.repeat:
            return None
        digest = hashlib.sha256(f"{self.seed} {path} {byte_range} {occurrence}".encode()).digest()
        chance, choice = struct.unpack("<II", digest[:8])
        return self.kinds[choice % len(self.kinds)] if chance < self.share * 2**32 else None


@dataclass(frozen=True)
class Passed:
    """One request that came, and what was done to it."""

    method: str
    path: str
    range: str
    fault: str | None


@dataclass(frozen=True)
class Answer:
    """What the server behind has said."""

    status: int
    headers: dict[str, str]
    body: bytes


class FaultProxy:
    """Listens on the loopback before the server at ``port``. Use as a context."""

    def __init__(self, port: int, faults: Faults = Faults()) -> None:
        self._lock = threading.Lock()
        self.harm(faults)
        self.closing = threading.Event()
        self._behind = port
        self._server: _Server | None = None
        self._start(0)
        assert self._server is not None
        self.port: int = self._server.server_address[1]

    @property
    def url(self) -> str:
        """Without a slash at its end."""
        return f"http://127.0.0.1:{self.port}"

    def harm(self, faults: Faults) -> None:
        """Forget what has been; from now on do this."""
        with self._lock:
            self.faults = faults
            self.seen: list[Passed] = []
            self._times: Counter[tuple[str, str, str]] = Counter()

    @property
    def counts(self) -> Counter[str]:
        """How often each fault has struck."""
        with self._lock:
            return Counter(passed.fault for passed in self.seen if passed.fault is not None)

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @contextlib.contextmanager
    def dead(self) -> Iterator[None]:
        """Nobody listens meanwhile, and connections are gone."""
        self._stop()
        try:
            yield
        finally:
            self._start(self.port)

    def _start(self, port: int) -> None:
        self.closing.clear()
        self._server = _Server(("127.0.0.1", port), self)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def _stop(self) -> None:
        self.closing.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.close_all()
            self._server = None

    def note(self, method: str, path: str, byte_range: str) -> str | None:
        """Record a request; gives the fault that is to strike it."""
        with self._lock:
            occurrence = self._times[method, path, byte_range]
            self._times[method, path, byte_range] += 1
            fault = self.faults.strike(path, byte_range, occurrence)
            if method == "HEAD" and fault not in ("reset", "error 500", "error 503"):
                fault = None  # there is no body to harm
            self.seen.append(Passed(method, path, byte_range, fault))
            return fault

    def ask(self, method: str, path: str, headers: dict[str, str]) -> Answer:
        """The honest answer of the server behind."""
        connection = http.client.HTTPConnection("127.0.0.1", self._behind, timeout=60)
        try:
            connection.request(method, path, headers={**headers, "Connection": "close"})
            response = connection.getresponse()
            dropped = ("connection", "transfer-encoding", "keep-alive", "date", "server")
            kept = {name: value for name, value in response.getheaders() if name.lower() not in dropped}
            return Answer(response.status, kept, response.read())
        finally:
            connection.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], proxy: FaultProxy) -> None:
        self.proxy = proxy
        self.open: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is none of ours."""

    def close_all(self) -> None:
        self.server_close()
        for connection in list(self.open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._pass("HEAD")

    def do_GET(self) -> None:
        self._pass("GET")

    def _pass(self, method: str) -> None:
        proxy, headers = self.server.proxy, dict(self.headers.items())
        plain = self.path.partition("?")[0]
        fault = proxy.note(method, plain, self.headers.get("Range", ""))
        if fault == "reset":
            self._reset()
            return
        if fault in ("error 500", "error 503"):
            self._send(method, Answer(int(fault.split()[1]), {"Content-Type": "text/plain"}, b"out of order\n"))
            return
        path = other_shard(self.path) if fault in ("wrong object", "other length") else self.path
        answer = proxy.ask(method, path, headers)
        if fault is None or answer.status >= 400:
            self._send(method, answer)
        elif fault in ("cut", "stall", "slow"):
            self._send_badly(fault, answer)
        else:
            length = len(proxy.ask(method, self.path, headers).body) if fault == "wrong object" else None
            self._send(method, harmed(fault, answer, length))

    def _send(self, method: str, answer: Answer) -> None:
        self._head(answer)
        if method != "HEAD":
            self.wfile.write(answer.body)

    def _head(self, answer: Answer) -> None:
        self.send_response(answer.status)
        known = {name.lower(): value for name, value in answer.headers.items()}
        for name, value in answer.headers.items():
            if name.lower() != "content-length":
                self.send_header(name, value)
        self.send_header("Content-Length", known.get("content-length", str(len(answer.body))))
        self.end_headers()

    def _send_badly(self, fault: str, answer: Answer) -> None:
        self._head(answer)
        body = answer.body
        if fault == "slow":
            size = max(1, -(-len(body) // 20))
            for start in range(0, len(body), size):
                self.wfile.write(body[start : start + size])
                time.sleep(PAUSE_S)
            return
        self.wfile.write(body[: len(body) // 2])
        if fault == "stall":
            self.server.proxy.closing.wait()
        self.close_connection = True

    def _reset(self) -> None:
        # Closing with a linger time of 0 sends RST, unless a shutdown has sent FIN before.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())
        self.close_connection = True


def other_shard(path: str) -> str:
    """The path of the shard before this one, for shard 0 of the one after it; other paths stay."""
    found = re.search(r"shard-(\d+)\.tar", path)
    if found is None:
        return path
    number = int(found[1])
    return path.replace(found[0], f"shard-{number - 1 if number else 1:06d}.tar")


def harmed(fault: str, answer: Answer, length: int | None) -> Answer:
    """An answer whose headers agree with its body, which is not the one that was asked for."""
    body = answer.body
    match fault:
        case "truncated":
            body = body[: len(body) // 2]
        case "bit flip":
            at = len(body) // 2
            body = body[:at] + bytes([body[at] ^ 16]) + body[at + 1 :] if body else body
        case "wrong object":
            assert length is not None
            body = body[:length].ljust(length, b"\0")
    headers = {name: value for name, value in answer.headers.items() if name.lower() != "content-length"}
    for name, value in answer.headers.items():
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", value)
        if name.lower() == "content-range" and found is not None:
            end = int(found[1]) + len(body)
            total = end if fault == "truncated" else max(end, int(found[2]))
            headers[name] = f"bytes {found[1]}-{end - 1}/{total}"
    return Answer(answer.status, {**headers, "Content-Length": str(len(body))}, body)
