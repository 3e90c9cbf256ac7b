"""Byte ranges of remote files come whole or not at all, whatever the server does; secrets are never told."""

from __future__ import annotations

import contextlib
import gzip
import importlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import fsspec
import numpy as np
import pytest
from fsspec.asyn import AsyncFileSystem

from pipeline.common.errors import UserError
from pipeline.common.locations import Url, local_path, location
from pipeline.dataset import remote_files as remote
from pipeline.dataset.remote_files import FetchCancelledError, RemoteFolder
from tests.helpers.fault_proxy import FAULTS, FaultProxy, Faults
from tests.helpers.servers import BUCKET, S3_KEYS, Nginx, free_port, nginx, s3_environment, s3_server
from tests.helpers.sessions import ROOT

NAME, SIZE = "shard-000001.tar", 5300
CONTENT = np.random.default_rng(1).bytes(SIZE)
SECRET = "s3cr3t"
NEVER = threading.Event()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("served")
    for number in range(2):
        (made / f"shard-{number:06d}.tar").write_bytes(np.random.default_rng(number).bytes(SIZE))
    return made


@pytest.fixture(scope="module")
def behind(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    with nginx(folder, tmp_path_factory.mktemp("nginx")) as server:
        yield server


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PIECE", 1000)
    monkeypatch.setattr(remote, "FIRST_DELAY_S", 0.01)


def all_of(url: str, retry_minutes: float = 1) -> bytes:
    return b"".join(RemoteFolder(Url(url), retry_minutes).pieces(NAME, SIZE, 0, NEVER))


HEALED = [fault for fault in FAULTS if fault not in ("wrong object", "other length", "bit flip")]


@pytest.mark.parametrize("fault", HEALED)
def test_a_piece_that_fails_is_asked_for_again(
    fault: str, behind: Nginx, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "stall":
        monkeypatch.setattr(remote, "PIECE_TIMEOUT_S", 0.3)
    with FaultProxy(behind.port, Faults((fault,))) as proxy:
        assert all_of(proxy.url) == CONTENT
        assert proxy.counts == {fault: 6}  # each of six pieces once
        assert len(proxy.seen) == (6 if fault == "slow" else 12) or fault == "stall"  # a busy machine is late as well


def test_what_begins_in_the_middle_is_the_rest(behind: Nginx, impatient: None) -> None:
    rest = RemoteFolder(Url(behind.url), 1).pieces(NAME, SIZE, 2500, NEVER)
    assert b"".join(rest) == CONTENT[2500:]


def test_a_server_that_comes_back_is_waited_for(behind: Nginx, impatient: None) -> None:
    with FaultProxy(behind.port) as proxy:
        files = RemoteFolder(Url(proxy.url), 1)
        assert files.read(NAME, 0, 10, NEVER) == CONTENT[:10]  # its connection stays open
        with proxy.dead():
            got: list[bytes] = []
            reader = threading.Thread(target=lambda: got.append(files.read(NAME, 10, 20, NEVER)))
            reader.start()
            reader.join(0.3)
            assert not got
        reader.join()
        assert got == [CONTENT[10:30]]


def test_a_file_without_a_checksum_is_read_until_two_reads_agree(behind: Nginx, impatient: None) -> None:
    with FaultProxy(behind.port, Faults(("bit flip",))) as proxy:
        assert RemoteFolder(Url(proxy.url), 1).read_whole(NAME, 1 << 20) == CONTENT
        assert len(proxy.seen) == 3


@pytest.mark.parametrize("kind", ["no such file", "no permission", "signature"])
def test_what_waiting_does_not_help_ends_after_a_few_attempts(
    kind: str, folder: Path, tmp_path: Path, impatient: None
) -> None:
    secrets = {"no permission": {"password": f"reader:{SECRET}x"}, "signature": {"signature": f"{SECRET}x"}}
    with nginx(folder, tmp_path / "nginx", **secrets.get(kind, {})) as server:
        url = Url(f"http://reader:{SECRET}@127.0.0.1:{server.port}/folder?signature={SECRET}")
        with pytest.raises(UserError) as error:
            RemoteFolder(url, 60).read(NAME, 0, 10, NEVER)
        requests = server.requests()
    reasons = {"no such file": "no such file", "no permission": "HTTP status 401", "signature": "HTTP status 403"}
    assert f"cannot fetch {NAME} of http://***@127.0.0.1:{server.port}/folder?***: {reasons[kind]}" in str(error.value)
    assert SECRET not in everything_about(error.value)
    assert len(requests) == remote.HOPELESS_ATTEMPTS


READ_ALL = """
import sys, threading
from pipeline.dataset import remote_files as remote
from pipeline.common.locations import Url
remote.FIRST_DELAY_S = 0.01
name, size = sys.argv[2], int(sys.argv[3])
for piece in remote.RemoteFolder(Url(sys.argv[1]), 60).pieces(name, size, 0, threading.Event()):
    sys.stdout.buffer.write(piece)
"""


def read_apart(url: str, environment: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
    """In a process of its own: certificates are looked for when aiohttp is imported."""
    command = [sys.executable, "-c", READ_ALL, url, NAME, str(SIZE)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SSL_CERT")}
    return subprocess.run(
        command, cwd=ROOT, env={**clean, **environment}, capture_output=True, timeout=120, check=False
    )


def test_https_is_read_where_its_certificate_is_trusted_and_nowhere_else(folder: Path, tmp_path: Path) -> None:
    with nginx(folder, tmp_path / "nginx", tls=True) as server:
        trusting = read_apart(server.url, {"SSL_CERT_FILE": str(server.certificate)})
        assert trusting.stdout == CONTENT, trusting.stderr
        asked = len(server.requests())
        careful = read_apart(server.url, {})
        assert careful.returncode == 1
        assert careful.stdout == b""
        said = careful.stderr.decode()
        assert "its certificate is not trusted here (SSL_CERT_FILE" in said
        assert f"{remote.HOPELESS_ATTEMPTS} times in" in said
        assert len(server.requests()) == asked


def everything_about(error: BaseException) -> str:
    """What a person sees: the message; its causes are shown only by tracebacks, which a UserError has none of."""
    return f"{error} {error!r}"


def test_patience_ends(impatient: None, capsys: pytest.CaptureFixture[str]) -> None:
    url = Url(f"http://reader:{SECRET}@127.0.0.1:{free_port()}/folder?signature={SECRET}")
    with pytest.raises(
        UserError, match=rf"cannot fetch {NAME} of http://\*\*\*@127.0.0.1:\d+/folder\?\*\*\*: "
    ) as error:
        RemoteFolder(url, 0.01).read(NAME, 0, 10, NEVER)
    said = capsys.readouterr()
    assert "attempt 3" in said.err
    assert SECRET not in everything_about(error.value) + said.err + said.out


def test_a_reader_that_is_not_needed_any_more_does_not_wait(
    behind: Nginx, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither between attempts, here of ten minutes, nor for an answer."""
    monkeypatch.setattr(remote, "FIRST_DELAY_S", 1200.0)
    monkeypatch.setattr(remote, "LONGEST_DELAY_S", 1200.0)
    monkeypatch.setattr(remote, "PIECE_TIMEOUT_S", 600.0)
    for fault in ("error 503", "stall"):
        cancelled = threading.Event()
        with FaultProxy(behind.port, Faults((fault,), repeat=None)) as proxy:
            with ThreadPoolExecutor(1) as thread:
                reading = thread.submit(RemoteFolder(Url(proxy.url), 60).read, NAME, 0, 10, cancelled)
                while not proxy.seen:
                    time.sleep(0.01)
                cancelled.set()
                with pytest.raises(FetchCancelledError):
                    reading.result()
            assert len(proxy.seen) == 1


def test_a_server_without_ranges_is_refused(folder: Path, tmp_path: Path, impatient: None) -> None:
    with nginx(folder, tmp_path / "nginx", ranges=False) as server:
        with pytest.raises(UserError, match="ignores range requests"):
            all_of(server.url)
        assert len(server.requests()) == remote.HOPELESS_ATTEMPTS  # a proxy on the way may have answered for once


def test_password_and_signature_reach_the_server(folder: Path, tmp_path: Path, impatient: None) -> None:
    strange = "p@ss w/rd%"
    with nginx(folder, tmp_path / "nginx", password=f"reader:{strange}", signature="a%2Fb%3D") as server:
        assert all_of(f"http://reader:p%40ss%20w%2Frd%25@127.0.0.1:{server.port}/?signature=a%2Fb%3D") == CONTENT
        assert {request.query for request in server.requests()} == {"signature=a%2Fb%3D"}


@pytest.fixture
def bucket(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    pytest.importorskip("s3fs")
    with s3_server(folder, "deep/photos") as port, FaultProxy(port) as proxy:
        for name, value in s3_environment(proxy.port).items():
            monkeypatch.setenv(name, value)
        yield proxy


def test_s3(bucket: FaultProxy, impatient: None, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"s3://{BUCKET}/deep/photos"
    bucket.harm(Faults(("cut", "error 500", "error 503", "reset", "truncated"), share=0.5, repeat=2))
    assert all_of(url) == CONTENT
    assert bucket.counts.total() >= 3
    assert all(passed.range for passed in bucket.seen)
    for missing in (f"{url}/nowhere", "s3://no-such-bucket/photos"):
        bucket.harm(Faults())
        with pytest.raises(UserError, match=f"cannot fetch {NAME} of {missing}: no such file"):
            all_of(missing)
        assert len(bucket.seen) == remote.HOPELESS_ATTEMPTS
    assert not any(secret in repr(capsys.readouterr()) for secret in S3_KEYS.values())


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, "gs", raising=False)
    with pytest.raises(
        UserError, match=r"gs://bucket/photos needs a package that is not installed: pip install -e \.\[gcs\]"
    ):
        RemoteFolder(Url("gs://bucket/photos"), 1)
    with pytest.raises(UserError, match="nothing is known of gopher://"):
        RemoteFolder(Url("gopher://host/photos"), 1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # fsspec's, of a file system half made
def test_a_file_system_that_a_url_alone_does_not_open() -> None:
    with pytest.raises(UserError, match=r"ftp:// wants more than a URL says; s3, gs, https and hf can be read"):
        RemoteFolder(Url("ftp://host/photos"), 1)


# How a dataset is named.


@pytest.mark.parametrize(
    ("url", "shown", "file"),
    [
        ("s3://bucket/photos/", "s3://bucket/photos/", "s3://bucket/photos/a.tar"),
        ("https://host/photos", "https://host/photos", "https://host/photos/a.tar"),
        ("https://me:hush@host:8000/p?sig=hush&x", "https://***@host:8000/p?***", "https://me:hush@host:8000/p/a.tar?sig=hush&x"),
        ("https://hush@host/p", "https://***@host/p", "https://hush@host/p/a.tar"),
        ("https://host/p/#hush", "https://host/p/", "https://host/p/a.tar"),
        ("hf://datasets/me/photos@main/x", "hf://datasets/me/photos@main/x", "hf://datasets/me/photos@main/x/a.tar"),
    ],
)  # fmt: skip
def test_a_url_shows_no_secret_and_keeps_it_for_the_server(url: str, shown: str, file: str) -> None:
    named = location(url)
    assert isinstance(named, Url)
    assert str(named) == f"{named}" == shown
    assert "hush" not in f"{named} {named!r} {named.file('a.tar')!r}"
    assert named.file("a.tar").secret == file


def test_a_password_that_is_not_written_as_a_url_demands_is_refused_and_not_shown() -> None:
    for url in ("me:hu/sh@host/p", "me:hu?sh@host/p", "me:hu#sh@host/p", "me:1/hu@host/p", "me:h[u@host/p"):
        with pytest.raises(UserError, match="%") as error:
            location(f"https://{url}")
        assert "hu" not in str(error.value)


def test_other_names_are_folders() -> None:
    assert location("data/photos") == Path("data/photos")
    assert location("/a/http/b:c") == Path("/a/http/b:c")
    with pytest.raises(UserError, match="names no host or bucket"):
        location("s3:///photos")


def test_results_go_to_a_path_and_no_url() -> None:
    """Path would make ``s3:/bucket/run`` of it, a folder here."""
    assert local_path("runs/a:b") == Path("runs/a:b")
    with pytest.raises(UserError, match="s3://bucket/run: results are written to a folder"):
        local_path("s3://bucket/run")


class Flood:
    """A server that answers with the given head and then sends zeros for as long as the client takes them."""

    def __init__(self, head: str) -> None:
        self.sent, self.requests = 0, 0
        self._head = head.encode()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def __enter__(self) -> Flood:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), client:
                client.recv(1 << 16)
                self.requests += 1
                client.sendall(self._head)
                for _ in range(4096):  # 256 MB, and then it would be too much anyway
                    client.sendall(bytes(1 << 16))
                    self.sent += 1 << 16


@pytest.mark.parametrize(
    "head",
    [
        "HTTP/1.1 200 OK\r\n\r\n",  # a range was asked for
        "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-99/200\r\n\r\n",  # and no length is given
        "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-99/200\r\nContent-Length: 99999999999\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
        "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-99/200\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFF\r\n",
    ],
)
def test_an_endless_answer_to_a_range_is_not_read(head: str, impatient: None) -> None:
    with Flood(head) as server:
        with pytest.raises(UserError, match="ignores range requests"):
            RemoteFolder(Url(server.url), 1).read(NAME, 0, 100, threading.Event())
        assert server.requests == remote.HOPELESS_ATTEMPTS
        assert server.sent < 32 << 20  # what the sockets' buffers take


def test_a_file_without_an_end_is_read_up_to_its_limit(impatient: None) -> None:
    with Flood("HTTP/1.1 200 OK\r\n\r\n") as server:
        with pytest.raises(UserError, match="larger than 1,000 bytes"):
            RemoteFolder(Url(server.url), 1).read_whole(NAME, 1000)
        assert server.sent < 32 << 20


def test_a_compressed_answer_is_refused_before_it_is_unpacked(impatient: None) -> None:
    bomb = gzip.compress(bytes(64 << 20))
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(bomb)}\r\n\r\n"
    with Flood(head) as server:
        server._head += bomb
        with pytest.raises(UserError, match="Content-Encoding 'gzip'"):
            RemoteFolder(Url(server.url), 1).read_whole(NAME, 1 << 30)


def test_truncated_answers_are_asked_again_while_others_arrive(behind: Nginx, impatient: None) -> None:
    faults = Faults(("truncated",), only=r"bytes=0-", repeat=2 * remote.HOPELESS_ATTEMPTS)
    with FaultProxy(behind.port, faults) as proxy:
        remote_folder = RemoteFolder(Url(proxy.url), 1)
        stop = threading.Event()

        def others() -> None:
            while not stop.is_set():
                remote_folder.read(NAME, 1000, 1000, threading.Event())
                time.sleep(0.001)

        thread = threading.Thread(target=others)
        thread.start()
        try:
            assert remote_folder.read(NAME, 0, 1000, threading.Event()) == CONTENT[:1000]
        finally:
            stop.set()
            thread.join()
        assert proxy.counts["truncated"] == 2 * remote.HOPELESS_ATTEMPTS


class _ReadsWholeBodies(AsyncFileSystem):
    """As gcsfs, at a server of the test: it asks by aiohttp, with the session's options that it was given."""

    protocol = ("gs", "gcs")
    server = ""

    def __init__(self, session_kwargs: dict[str, Any], **more: Any) -> None:
        super().__init__(**more)
        self._kwargs = session_kwargs

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **more: Any) -> bytes:
        headers = {"Range": f"bytes={start}-{(end or 1) - 1}"}
        async with (
            aiohttp.ClientSession(**self._kwargs) as session,
            session.get(self.server, headers=headers) as answer,
        ):
            return await answer.read()


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", "ignores range requests"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", "ignores range requests"),
        (b"HTTP/1.1 206 Partial Content\r\nContent-Encoding: gzip\r\n\r\n", "Content-Encoding 'gzip'"),
    ],
)
def test_an_endless_answer_of_a_google_bucket_is_cut(head: bytes, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than what was asked for is held, though the file system's client would read to the end."""
    sent = [0]
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                connection.sendall(head)
                while sent[0] < 1 << 30:
                    sent[0] += connection.send(bytes(1 << 16))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    fsspec.register_implementation("gs", _ReadsWholeBodies, clobber=True)
    monkeypatch.setattr(_ReadsWholeBodies, "server", f"http://127.0.0.1:{listening.getsockname()[1]}/")
    monkeypatch.setattr(remote, "FIRST_DELAY_S", 0.01)
    try:
        with pytest.raises(UserError, match=said):
            RemoteFolder(Url("gs://bucket/set"), 1.0).read("shard-000000.tar", 0, 2600, threading.Event())
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join(10)
        del importlib.import_module("fsspec.registry")._registry["gs"]
    assert sent[0] < 64 << 20  # what the sockets' buffers took, of four attempts
