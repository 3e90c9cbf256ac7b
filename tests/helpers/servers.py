"""Real servers on the loopback for remote datasets: nginx over a folder, and moto's S3 server over a bucket."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import shutil
import socket
import ssl
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

from pipeline.sources.remote_path import remote_folder

BUCKET = "images"
S3_KEYS = {"AWS_ACCESS_KEY_ID": "AKIAWELLKNOWNTOALL", "AWS_SECRET_ACCESS_KEY": "hush-hush-secret-of-s3"}

NGINX_CONFIG = """
daemon off;
master_process off;
error_log error.log;
pid nginx.pid;
events {{ worker_connections 512; }}
http {{
  log_format requests escape=json '{{"method": "$request_method", "path": "$uri", "query": "$args", '
    '"range": "$http_range", "status": $status, "sent": $body_bytes_sent}}';
  access_log requests.log requests;
  {temporary}
  types {{ }}
  default_type application/octet-stream;
  {ranges}
  server {{
    listen 127.0.0.1:{port}{tls};
    location = /-flushed- {{ access_log off; return 204; }}
    location / {{
      {password}
      {signature}
      root {folder};
      {listing}
    }}
  }}
}}
"""


@dataclass(frozen=True)
class Request:
    """One answered request, as nginx logged it."""

    method: str
    path: str
    query: str
    range: str  # "bytes=0-99", or "" for the whole file
    status: int
    sent: int  # bytes of the body

    @property
    def file(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class Nginx:
    """A running nginx."""

    port: int
    folder: Path  # what it serves
    work: Path  # configuration and logs
    certificate: Path | None = None  # which nobody trusts but those who are told to

    @property
    def url(self) -> str:
        """Without a slash at its end."""
        return f"{'http' if self.certificate is None else 'https'}://127.0.0.1:{self.port}"

    def requests(self) -> list[Request]:
        """All requests that ended so far, in the order in which they ended."""
        # nginx logs a request before it looks at the next one, and only one process does everything.
        trust = None if self.certificate is None else ssl.create_default_context(cafile=str(self.certificate))
        with urllib.request.urlopen(f"{self.url}/-flushed-", timeout=30, context=trust):
            pass
        return [Request(**json.loads(line)) for line in (self.work / "requests.log").read_text().splitlines()]

    def sent(self) -> dict[str, int]:
        """Bytes sent by file name, of those files of which any were."""
        total: dict[str, int] = {}
        for request in self.requests():
            if request.method == "GET" and request.status in (200, 206):
                total[request.file] = total.get(request.file, 0) + request.sent
        return total


@contextlib.contextmanager
def nginx(
    folder: Path,
    work: Path,
    *,
    ranges: bool = True,
    password: str = "",
    signature: str = "",
    tls: bool = False,
    listing: bool = False,
) -> Iterator[Nginx]:
    """Serve ``folder``; ``work`` holds configuration and logs. Skips the test where nginx is not installed.

    ``ranges=False``: always the whole file. ``password``: "USER:PASSWORD" that requests must bring (no further colon),
    ``signature``: what they must have behind ?signature=; others are answered by 401 and 403. ``tls``: https, with a
    certificate of its own. ``listing``: with index pages of its folders.
    """
    program = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
    if program is None:
        pytest.skip("nginx is not installed: apt-get install nginx-light")
    work.mkdir(parents=True, exist_ok=True)
    certificate = self_signed(work) if tls else None
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    (work / "passwords").write_text(password.replace(":", ":{PLAIN}", 1))
    for _ in range(5):  # somebody else may take the port before nginx does
        port = free_port()
        (work / "nginx.conf").write_text(
            NGINX_CONFIG.format(
                temporary=" ".join(f"{kind}_temp_path {work}/{kind};" for kind in kinds),
                ranges="" if ranges else "max_ranges 0;",
                port=port,
                tls=f" ssl; ssl_certificate {certificate}; ssl_certificate_key {work}/key.pem" if tls else "",
                password=f"auth_basic all; auth_basic_user_file {work}/passwords;" if password else "",
                signature=f'if ($arg_signature != "{signature}") {{ return 403; }}' if signature else "",
                folder=folder,
                listing="autoindex on; types { text/html html; }" if listing else "",
            )
        )
        command = [program, "-p", str(work), "-c", str(work / "nginx.conf"), "-e", str(work / "error.log")]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            if _listens(process, port):
                yield Nginx(port, folder, work, certificate)
                return
        finally:
            process.terminate()
            process.wait(timeout=30)
    raise RuntimeError(f"nginx does not start: {(work / 'error.log').read_text()}")


def self_signed(work: Path) -> Path:
    """A certificate for 127.0.0.1, with its key in key.pem beside it. Skips the test where openssl is not installed."""
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("openssl is not installed: apt-get install openssl")
    names = ["-subj", "/CN=siamstream tests", "-addext", "subjectAltName=IP:127.0.0.1"]
    uses = ["-addext", "keyUsage=critical,digitalSignature,keyCertSign"]
    files = ["-keyout", str(work / "key.pem"), "-out", str(work / "certificate.pem")]
    command = [program, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names, *uses, *files]
    subprocess.run(command, check=True, capture_output=True)
    return work / "certificate.pem"


def _listens(process: subprocess.Popen[bytes], port: int) -> bool:
    """Wait until the process takes connections; False if it ends instead."""
    while process.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return process.poll() is None
        except OSError:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.05)
    return False


def free_port() -> int:
    """A port of the loopback on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def s3_server(folder: Path, prefix: str = "photos", address: str = "127.0.0.1") -> Iterator[int]:
    """Moto's S3 server with the files of ``folder`` under s3://BUCKET/``prefix``; gives its port at ``address``.

    One at a time in a process: Moto keeps the objects of all servers in one place, which is emptied first.
    """
    server_module = pytest.importorskip("moto.server")
    remote_folder.cache_clear()  # of an earlier server under the same URL, whose port the environment held
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer(address, 0, verbose=False)
    server.start()
    try:
        port = int(server.get_host_and_port()[1])
        urllib.request.urlopen(f"http://{address}:{port}/moto-api/reset", data=b"", timeout=30).close()
        client = s3_client(port, address)
        client.create_bucket(Bucket=BUCKET)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                client.upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(folder)}")
        yield port
    finally:
        server.stop()


@contextlib.contextmanager
def s3_here(folder: Path, prefix: str = "photos") -> Iterator[Any]:
    """As ``s3_server``, with this process led to it by its environment; gives a client."""
    with s3_server(folder, prefix) as port, pytest.MonkeyPatch.context() as patch:
        for name, value in s3_environment(port).items():
            patch.setenv(name, value)
        yield s3_client(port)


def s3_client(port: int, address: str = "127.0.0.1") -> Any:
    """Boto's client of an S3 server of a test."""
    boto3 = pytest.importorskip("boto3")
    return boto3.client(
        "s3",
        endpoint_url=f"http://{address}:{port}",
        region_name="us-east-1",
        aws_access_key_id=S3_KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=S3_KEYS["AWS_SECRET_ACCESS_KEY"],
    )


def s3_environment(port: int, address: str = "127.0.0.1") -> dict[str, str]:
    """The environment that leads s3fs to a server of a test, with keys that nobody else takes."""
    here = {"AWS_ENDPOINT_URL": f"http://{address}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    nowhere = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
    return {**S3_KEYS, **here, **nowhere, "AWS_EC2_METADATA_DISABLED": "true"}


@contextlib.contextmanager
def google_here(folder: Path, prefix: str = "photos") -> Iterator[Any]:
    """An emulator of Google Cloud Storage with the files of ``folder`` under gs://BUCKET/``prefix``.

    This process is led to it by its environment; gives gcsfs's file system.
    """
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    logging.getLogger("gcp_storage_emulator").setLevel(logging.ERROR)
    remote_folder.cache_clear()
    port = free_port()
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
    server.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            _honour_preconditions(patch)
            _tell_generations(patch, emulator.HANDLERS)
            patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
            patch.setenv("GOOGLE_CLOUD_PROJECT", "tests")
            patch.setenv("GCE_METADATA_IP", f"127.0.0.1:{free_port()}")  # no credentials there, and at once
            # Otherwise gcsfs asks by gRPC what kind of bucket it is, which the emulator does not know
            patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
            gcsfs = pytest.importorskip("gcsfs")
            client = gcsfs.GCSFileSystem(skip_instance_cache=True, use_listings_cache=False)
            client.put(str(folder), f"{BUCKET}/{prefix}", recursive=True)
            yield client
    finally:
        server.stop()


def _honour_preconditions(patch: pytest.MonkeyPatch) -> None:
    """Let the emulator refuse to make an object that is there (ifGenerationMatch=0), as Google's servers do."""
    objects = importlib.import_module("gcp_storage_emulator.handlers.objects")
    storage = importlib.import_module("gcp_storage_emulator.storage").Storage
    missing = importlib.import_module("gcp_storage_emulator.exceptions").NotFound
    asked = threading.local()
    upload, create_file = objects._multipart_upload, storage.create_file

    def upload_new(request: Any, response: Any, store: Any) -> None:
        asked.new = request.query.get("ifGenerationMatch") == ["0"]
        try:
            upload(request, response, store)
        except FileExistsError:
            response.status = HTTPStatus.PRECONDITION_FAILED
        finally:
            asked.new = False

    def create_new(store: Any, bucket: str, name: str, *args: Any, **kwargs: Any) -> None:
        if getattr(asked, "new", False):
            with contextlib.suppress(missing):
                store.get_file_obj(bucket, name)
                raise FileExistsError(name)
        create_file(store, bucket, name, *args, **kwargs)

    patch.setattr(objects, "_multipart_upload", upload_new)
    patch.setattr(storage, "create_file", create_new)


def _tell_generations(patch: pytest.MonkeyPatch, handlers: Any) -> None:
    """Let the emulator send the header X-Goog-Generation with an object's contents, as Google's servers do."""
    objects = importlib.import_module("gcp_storage_emulator.handlers.objects")
    download = objects.download

    def with_generation(request: Any, response: Any, store: Any, *args: Any, **kwargs: Any) -> None:
        download(request, response, store, *args, **kwargs)
        if response.status < HTTPStatus.MULTIPLE_CHOICES:
            about = store.get_file_obj(request.params["bucket_name"], request.params["object_id"])
            response["X-Goog-Generation"] = about["generation"]

    for _, methods in handlers:
        for method, handler in methods.items():
            if handler is download:
                patch.setitem(methods, method, with_generation)
    patch.setattr(objects, "download", with_generation)
