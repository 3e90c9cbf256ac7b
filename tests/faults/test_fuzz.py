"""Fuzzers: whatever a file or a server holds, the outcome is right data, a named bad sample or a documented error.

Each runs in a child with bounded memory, files and time (tests/helpers/bounded.py). What they have found before is an
explicit example here, or a case of the tests beside the code that was mended.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import inspect
import io
import json
import os
import shutil
import socket
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import pipeline.dataset.remote_files
from pipeline.checking.check_dataset import inspect_dataset
from pipeline.checking.check_shard import CheckOptions
from pipeline.common.errors import UserError
from pipeline.common.locations import Url
from pipeline.dataset.dataset import BadSampleError, ShardSet
from pipeline.dataset.remote_files import RemoteFolder
from pipeline.sharding.make_dataset import make_dataset
from pipeline.sharding.options import ShardingOptions
from pipeline.sources.devkit import devkit_classes
from pipeline.sources.label_file import ImageNames, read_label_file
from pipeline.sources.open_source import open_source
from tests.helpers import bounded as one
from tests.helpers.bounded import bounded, run_in_child
from tests.helpers.coverage_guided import fuzz
from tests.helpers.photos import image_bytes
from tests.pipeline.sources.test_labels import META_MAT, devkit
from tests.pipeline.sources.test_parquet import images, write
from train.storage.encoder_files import read_weights
from train.storage.run_folder import cut_off, read_lines, read_run
from train.storage.torch_files import read_torch_file

pytestmark = pytest.mark.faults
SECONDS = 150.0  # of one fuzzer, at the most, on a busy machine; alone it takes a tenth
FUZZ = settings(max_examples=120, suppress_health_check=list(HealthCheck))
DOCUMENTED = (UserError, BadSampleError)
JUNK = [b"\xff" * 8, bytes(8), b"\x7f\xff\xff\xff", b"\x80" + bytes(7), b"9" * 11, b"-1", b"\0", b"../../x", b"\n"]


@st.composite
def damaged(draw: st.DrawFn, whole: bytes, within: int | None = None) -> bytes:
    """``whole`` with bytes overwritten, put in, cut out or cut off, in the first ``within`` of them."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(0, min(len(data), within or len(data)) - 1)))
        junk = draw(st.one_of(st.binary(max_size=9), st.sampled_from(JUNK)))
        match draw(st.sampled_from(["overwrite", "put in", "cut out", "cut off", "flip"])):
            case "overwrite":
                data[start : start + len(junk)] = junk
            case "put in":
                data[start:start] = junk
            case "cut out":
                del data[start : start + draw(st.integers(1, 700))]
            case "cut off":
                del data[start:]
            case "flip" if data:
                data[start] ^= 1 << draw(st.integers(0, 7))
    return bytes(data)


def any_json(depth: int = 3) -> st.SearchStrategy[Any]:
    """Values that JSON can hold, odd numbers and deep ones among them."""
    numbers = [0, -1, 2**31 - 1, 2**63, -(2**70), 10**30, 0.5, float("nan"), float("inf")]
    plain = st.one_of(st.none(), st.booleans(), st.sampled_from(numbers), st.text(max_size=8), st.just("../../x"))
    return st.recursive(
        plain,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=depth,
    )


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A folder of one example, and nothing beside it."""
    path = Path(tempfile.mkdtemp())
    try:
        with one.example():
            yield path
    finally:
        shutil.rmtree(path)


def tar_header(name: bytes, kind: bytes, fields: dict[str, bytes]) -> bytes:
    """A ustar header with any bytes in its fields and a checksum that fits."""
    places = {
        "mode": (100, 8),
        "uid": (108, 8),
        "size": (124, 12),
        "mtime": (136, 12),
        "link": (157, 100),
        "magic": (257, 8),
        "prefix": (345, 155),
    }
    header = bytearray(512)
    header[:100] = name[:100].ljust(100, b"\0")
    header[156:157], header[257:265] = kind, b"ustar\x0000"
    for field, value in fields.items():
        start, length = places[field]
        header[start : start + length] = value[:length].ljust(length, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


NUMBERS = [
    b"00000000010",
    b"77777777777",
    b"-0000000001",
    b"\x80" + bytes(10) + b"\x05",
    b"\xff" * 12,
    b"",
    b"x",
    b"9" * 12,
    b"1 2",
]
KINDS = [b"0", b"\0", b"5", b"1", b"2", b"S", b"L", b"K", b"x", b"g", b"7", b"Z", b"\xff"]
PAX = [
    b"11 size=-1\n",
    b"20 size=99999999999\n",
    b"0 path=\n",
    b"-5 a=b\n",
    b"9999999999 path=x\n",
    b"12 path=../x\n",
    b"25 GNU.sparse.map=0,9,9,\n",
    b"13 path=\xff\xfe\n",
    b"\xff" * 40,
    b"30 GNU.sparse.realsize=-99999\n",
]


@st.composite
def crafted_tar(draw: st.DrawFn) -> bytes:
    """Members of every type with odd numbers in their headers, between good images."""
    parts = []
    for number in range(draw(st.integers(1, 5))):
        if draw(st.booleans()):
            data = image_bytes(number, 16, 16)
            parts.append(tar_header(b"c%d/%d.jpg" % (number % 2, number), b"0", {"size": b"%011o" % len(data)}))
            parts.append(data + bytes(-len(data) % 512))
            continue
        fields = {field: draw(st.sampled_from(NUMBERS)) for field in ("size", "mtime", "uid") if draw(st.booleans())}
        kind, name = draw(st.sampled_from(KINDS)), draw(st.one_of(st.binary(max_size=12), st.just(b"a/b.jpg")))
        body = draw(st.sampled_from([b"", *PAX, b"n" * 1000]))
        if kind in b"xgLK" and draw(st.booleans()):
            fields["size"] = b"%011o" % len(body)
        parts.append(tar_header(name, kind, fields) + body + bytes(-len(body) % 512))
    return b"".join(parts) + bytes(1024)


@bounded(SECONDS)
@FUZZ
@given(content=crafted_tar(), form=st.sampled_from(["", "wds:"]))
@example(content=tar_header(b"a.jpg", b"0", {"size": b"\xff" * 12}) + bytes(1024), form="")  # a negative size: for ever
@example(content=tar_header(b"p", b"x", {"size": b"00000000012"}) + b"9999999999 a".ljust(512, b"\0"), form="")
def test_tars(content: bytes, form: str) -> None:
    with folder() as path:
        (path / "set.tar").write_bytes(content)
        with contextlib.suppress(*DOCUMENTED):
            make_dataset(f"{form}{path / 'set.tar'}", path / "out", ShardingOptions(), quiet=True, in_process=True)
            dataset = ShardSet.open(path / "out")
            good = {image_bytes(number, 16, 16) for number in range(5)}
            assert {dataset.read(sample_id) for sample_id in range(len(dataset))} <= good
            assert inspect_dataset(path / "out", CheckOptions(decode="none", workers=1), quiet=True).fine
        assert {file.name for file in path.iterdir()} <= {"out", "set.tar"}


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    features = {"label": {"names": ["a", "b"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    path = write(tmp_path_factory.mktemp("parquet") / "train.parquet", features, image=images(), label=[0, 1, 0])
    return path.read_bytes()


@bounded(SECONDS)
@FUZZ
@given(data=st.data())
def test_parquet_files(parquet: bytes, data: st.DataObject) -> None:
    content = data.draw(damaged(parquet))
    with folder() as path:
        (path / "train.parquet").write_bytes(content)
        (path / "spool").mkdir()
        with contextlib.suppress(*DOCUMENTED):
            source = open_source(str(path / "train.parquet"), path / "spool")
            for index in range(min(len(source.listing), 10)):
                source.reader.read(source.listing, index)


ODD_TABLES: dict[str, Callable[[Any], Any]] = {
    "lists": lambda pa: {"image": images(), "label": [[0], [1], [2]]},
    "structs": lambda pa: {"image": images(), "label": [{"a": 1}, {"a": 2}, None]},
    "times": lambda pa: {"image": images(), "label": pa.array([0, 1, 2], pa.timestamp("ns"))},
    "decimals": lambda pa: {"image": images(), "label": pa.array([0, 1, 2]).cast(pa.decimal128(22, 2))},
    "nan": lambda pa: {"image": images(), "label": [float("nan"), float("inf"), -1e300]},
    "huge": lambda pa: {"image": images(), "label": pa.array([2**63, 0, 1], pa.uint64())},
    "text with controls": lambda pa: {"image": images(), "label": ["\x1b[31m", "a\0b", ""]},
    "binary": lambda pa: {"image": images(), "label": [b"\xff", b"\0", b""]},
    "nulls": lambda pa: {"image": images(), "label": pa.nulls(3)},
    "dictionary": lambda pa: {"image": images(), "label": pa.array(["a", "b", "a"]).dictionary_encode()},
    "a map": lambda pa: {"image": images(), "label": pa.array([[("a", 1)]] * 3, pa.map_(pa.string(), pa.int64()))},
    "unions of nothing": lambda pa: {"image": pa.nulls(3), "label": [0, 1, 2]},
    "images in lists": lambda pa: {"image": [[image_bytes(1)], [], None], "label": [0, 1, 2]},
    "images that are null": lambda pa: {"image": [None, *images(2)], "label": [0, 1, 2]},
    "images without bytes": lambda pa: {"image": [{"bytes": None, "path": "x"}] * 3, "label": [0, 1, 2]},
    "no rows": lambda pa: {"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())},
    "large binary": lambda pa: {"image": pa.array([image_bytes(1)] * 3, pa.large_binary()), "label": [0, 1, 2]},
    "fixed binary": lambda pa: {"image": pa.array([b"abcd"] * 3, pa.binary(4)), "label": [0, 1, 2]},
    "durations": lambda pa: {"image": images(), "label": pa.array([1, 2, 3], pa.duration("s"))},
    "booleans": lambda pa: {"image": images(), "label": [True, False, None]},
}


@pytest.mark.parametrize("kind", ODD_TABLES)
def test_odd_parquet_columns(kind: str, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    path = write(tmp_path / "train.parquet", **ODD_TABLES[kind](pa))
    for options in ({}, {"label_column": "label"}, {"image_column": "image"}):
        out = tmp_path / f"out{len(options)}{next(iter(options), '')}"
        try:
            make_dataset(str(path), out, ShardingOptions(**options), quiet=True, in_process=True)
        except UserError as error:
            assert "\x1b" not in repr(str(error))  # noqa: PT017
        else:
            assert len(ShardSet.open(out)) > 0


TABLE_BITS = [
    *("a/0.jpg", "0", "1.jpg", "b/2.jpg", ",", "\t", " ", "\n", "\r", '"', "\0", "\x1b[31m", "image", "label"),
    *("1e9", "-1", "2147483647", "é", "\ufeff", "|", ";", "#", "9" * 400, "nan"),
]


@bounded(SECONDS)
@FUZZ
@given(
    text=st.one_of(
        st.lists(st.sampled_from(TABLE_BITS), max_size=24).map("".join).map(str.encode), st.binary(max_size=60)
    ),
    column=st.sampled_from([None, "label", "nowhere"]),
)
@example(text=b"a/0.jpg,2147483647\n1.jpg,0\nb/2.jpg,0\n", column=None)  # two billion class names
def test_label_files(text: bytes, column: str | None) -> None:
    with folder() as path:
        (path / "labels.csv").write_bytes(text)
        with contextlib.suppress(*DOCUMENTED):
            labels = read_label_file(path / "labels.csv", ImageNames(["a/0.jpg", "a/1.jpg", "b/2.jpg"]), column)
            assert len(labels.words) == 3


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return gzip.decompress(devkit(tmp_path_factory.mktemp("kit") / "kit.tar.gz", "1\n3\n1\n").read_bytes())


@bounded(SECONDS)
@FUZZ
@given(data=st.data(), packed=st.booleans())
def test_devkits(kit: bytes, data: st.DataObject, packed: bool) -> None:
    content = data.draw(damaged(kit, 6000))
    with folder() as path:
        (path / "kit.tar.gz").write_bytes(gzip.compress(content) if packed else content)
        with contextlib.suppress(*DOCUMENTED):
            assert len(devkit_classes(path / "kit.tar.gz", 3)) == 3


@bounded(SECONDS)
@FUZZ
@given(data=st.data())
def test_meta_mat(data: st.DataObject) -> None:
    """The MATLAB file inside the devkit, which gzip and tar would only hide."""
    import base64

    content = data.draw(damaged(base64.b64decode(META_MAT)))
    with folder() as path:
        with tarfile.open(path / "kit.tar", "w") as tar:
            for name, member in (("d/meta.mat", content), ("d/ILSVRC2012_validation_ground_truth.txt", b"1\n3\n1\n")):
                entry = tarfile.TarInfo(name)
                entry.size = len(member)
                tar.addfile(entry, io.BytesIO(member))
        with contextlib.suppress(*DOCUMENTED):
            devkit_classes(path / "kit.tar", 3)


def read_all(path: Path, truth: list[bytes]) -> None:
    """Open the dataset and read it: each sample right or named as bad."""
    dataset = ShardSet.open(path)
    for sample_id in range(min(len(dataset), 100)):
        with contextlib.suppress(BadSampleError):
            assert dataset.read(sample_id) in truth
    with contextlib.suppress(UserError):
        names = dataset.names
        assert names is None or [names[n] for n in range(min(len(dataset), 100))]


@pytest.fixture(scope="module")
def truth(photo_dataset: ShardSet) -> list[bytes]:
    return [photo_dataset.read(sample_id) for sample_id in range(len(photo_dataset))]


@bounded(SECONDS)
@FUZZ
@given(data=st.data())
def test_dataset_json(photo_dataset_path: Path, truth: list[bytes], data: st.DataObject) -> None:
    """A value anywhere in it replaced by any other, or bytes of it changed."""
    whole = (photo_dataset_path / "dataset.json").read_bytes()
    if data.draw(st.booleans()):
        info = json.loads(whole)
        inner = data.draw(st.sampled_from([info, info["shards"][1], info["names"], info["recipe"]]))
        inner[data.draw(st.sampled_from(sorted(inner)))] = data.draw(any_json())
        content = json.dumps(info).encode()
    else:
        content = data.draw(damaged(whole))
    with folder() as path:
        for file in photo_dataset_path.iterdir():
            (path / file.name).symlink_to(file)
        (path / "dataset.json").unlink()
        (path / "dataset.json").write_bytes(content)
        with contextlib.suppress(*DOCUMENTED):
            read_all(path, truth)
        with contextlib.suppress(*DOCUMENTED):
            inspect_dataset(path, CheckOptions(decode="none", workers=1), quiet=True)


@bounded(SECONDS)
@FUZZ
@given(data=st.data(), name=st.sampled_from(["samples.npy", "names.npy", "names.bin", "rejected.jsonl"]))
@example(data=None, name="names.npy")  # numpy raises TokenError for its header
def test_sidecar_files_whose_checksum_fits(
    photo_dataset_path: Path, truth: list[bytes], data: st.DataObject | None, name: str
) -> None:
    """As a hostile dataset has them: dataset.json holds the checksum of the changed bytes."""
    whole = (photo_dataset_path / name).read_bytes()
    content = whole.replace(b"(49,)", b"(49-1") if data is None else data.draw(damaged(whole or b"{}\n"))
    assert data is not None or content != whole
    info = json.loads((photo_dataset_path / "dataset.json").read_bytes())
    digest = hashlib.sha256(content).hexdigest()
    if name == "samples.npy":
        info["samples_sha256"] = digest
    elif name == "names.bin":
        info["names"]["sha256"] = digest
    with folder() as path:
        for file in photo_dataset_path.iterdir():
            if file.name not in ("dataset.json", name):
                (path / file.name).symlink_to(file)
        (path / "dataset.json").write_text(json.dumps(info))
        (path / name).write_bytes(content)
        with contextlib.suppress(*DOCUMENTED):
            read_all(path, truth)
        with contextlib.suppress(*DOCUMENTED):
            inspect_dataset(path, CheckOptions(decode="none", workers=1), quiet=True)


ROWS = st.sampled_from([0, 1, 511, 512, 2**31 - 1, 2**32 - 1])


@bounded(SECONDS)
@FUZZ
@given(
    row=st.integers(0, 47),
    field=st.sampled_from(["shard", "offset", "length", "label", "height", "width", "checksum"]),
    value=ROWS,
)
def test_any_number_in_a_row_of_samples_npy(
    photo_dataset_path: Path, truth: list[bytes], row: int, field: str, value: int
) -> None:
    rows = np.load(photo_dataset_path / "samples.npy")
    rows[field][row] = np.array(value).astype(rows.dtype[field])
    with folder() as path:
        for file in photo_dataset_path.iterdir():
            if file.name not in ("dataset.json", "samples.npy"):
                (path / file.name).symlink_to(file)
        np.save(path / "samples.npy", rows)
        info = json.loads((photo_dataset_path / "dataset.json").read_bytes())
        info["samples_sha256"] = hashlib.sha256((path / "samples.npy").read_bytes()).hexdigest()
        (path / "dataset.json").write_text(json.dumps(info))
        with contextlib.suppress(*DOCUMENTED):
            read_all(path, truth)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    buffer = io.BytesIO()
    state = {"backbone.conv1.weight": torch.zeros(4, 3, 3, 3), "backbone.fc.bias": torch.zeros(4)}
    torch.save({"format": 1, "model": state, "config": {"model": {"backbone": "resnet_tiny"}}, "step": 3}, buffer)
    return buffer.getvalue()


@bounded(SECONDS)
@FUZZ
@given(data=st.data())
def test_checkpoints(checkpoint: bytes, data: st.DataObject) -> None:
    content = data.draw(damaged(checkpoint))
    with folder() as path:
        (path / "file.pt").write_bytes(content)
        for read in (read_torch_file, read_weights):
            with contextlib.suppress(*DOCUMENTED):
                read(path / "file.pt")


def test_a_compressed_checkpoint_is_no_bomb(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + bytes(200 << 20))
        archive.writestr("archive/version", b"3\n")
    with pytest.raises(UserError, match=r"torch\.save compresses nothing"):
        read_torch_file(tmp_path / "bomb.pt")


@bounded(SECONDS)
@FUZZ
@given(data=st.data())
def test_safetensors(data: st.DataObject) -> None:
    whole = safetensors.torch.save({"conv1.weight": torch.zeros(4, 3, 3, 3)}, {"siamstream": '{"model": {}}'})
    length = int.from_bytes(whole[:8], "little")
    if data.draw(st.booleans()):
        header = json.loads(whole[8 : 8 + length])
        inner = data.draw(st.sampled_from([header, header["conv1.weight"], header["__metadata__"]]))
        inner[data.draw(st.sampled_from([*inner, "new"]))] = data.draw(any_json())
        text = json.dumps(header).encode()
        content = len(text).to_bytes(8, "little") + text + whole[8 + length :]
    else:
        content = data.draw(damaged(whole))
    with folder() as path:
        (path / "file.safetensors").write_bytes(content)
        with contextlib.suppress(*DOCUMENTED):
            read_weights(path / "file.safetensors")


LINES = b'{"epoch": 0, "step": 1, "loss": -0.5, "lr": 0.1, "z_std": 0.2}\n{"epoch": 1, "step": 4, "knn_top1": 20.0}\n'


@bounded(SECONDS)
@FUZZ
@given(data=st.data())
@example(data=None)
def test_run_logs(data: st.DataObject | None) -> None:
    if data is None:
        content = LINES + b"[" * 100_000 + b"\n" + b"1" * 5000 + b"\n"
    elif data.draw(st.booleans()):
        line = json.loads(LINES.splitlines()[0])
        line[data.draw(st.sampled_from(sorted(line)))] = data.draw(any_json())
        content = LINES + json.dumps(line).encode() + b"\n"
    else:
        content = data.draw(damaged(LINES))
    with folder() as path:
        (path / "metrics.jsonl").write_bytes(content)
        (path / "config.json").write_text(
            '{"data": "nowhere", "model": {"backbone": "x", "dim": 8}, "views": {"image_size": 8}}'
        )
        (path / "plan.json").write_text('{"global_batch": 8, "num_samples": 8, "steps_per_epoch": 4}')
        with contextlib.suppress(*DOCUMENTED):
            read_run(path)
        kept = cut_off(path / "metrics.jsonl", 3)
        again = read_lines(path / "metrics.jsonl")  # infinity has become null, and so nan
        assert [(list(line), line["step"]) for line in kept] == [(list(line), line["step"]) for line in again]


ANSWER = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 10\r\nContent-Range: bytes 0-9/10\r\n\r\n0123456789"
HEADERS = [
    b"Content-Length: -1",
    b"Content-Length: 99999999999999999999",
    b"Content-Length: x",
    b"Content-Range: bytes 5-1/0",
    b"Content-Encoding: gzip",
    b"Content-Encoding: br",
    b"Transfer-Encoding: chunked",
    b"Connection: close",
    b"Location: /",
    b"X: " + b"y" * 9000,
]


@contextlib.contextmanager
def server(answer: bytes) -> Iterator[str]:
    """A server that sends these bytes to whatever it is asked, and closes; its URL."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(5)
                connection.recv(65536)
                connection.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/set"
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()


@bounded(SECONDS)
@settings(max_examples=50, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@example(data=None)
def test_http_answers(data: st.DataObject | None) -> None:
    if data is None:
        content = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + gzip.compress(bytes(64 << 20))
    elif data.draw(st.booleans()):
        status = data.draw(
            st.sampled_from(
                [b"200 OK", b"206 Partial Content", b"301 Moved", b"404 No", b"500 No", b"999 ?", b"100 Continue"]
            )
        )
        lines = [b"HTTP/1.1 " + status, *data.draw(st.lists(st.sampled_from(HEADERS), max_size=3)), b"", b"0123456789"]
        content = b"\r\n".join(lines) * data.draw(st.sampled_from([1, 3, 20_000]))
    else:
        content = data.draw(damaged(ANSWER))
    patch = pytest.MonkeyPatch()
    patch.setattr(pipeline.dataset.remote_files, "FIRST_DELAY_S", 0.001)
    patch.setattr(pipeline.dataset.remote_files, "PIECE_TIMEOUT_S", 3.0)
    with one.example(), server(content) as url, contextlib.redirect_stderr(io.StringIO()):
        remote = RemoteFolder(Url(url), 0.0)
        with contextlib.suppress(*DOCUMENTED):
            assert len(remote.read("shard-000000.tar", 0, 10, threading.Event())) == 10
        with contextlib.suppress(*DOCUMENTED):
            assert len(remote.read_whole("dataset.json", 1000)) <= 1000
    patch.undo()


FUZZERS = {name: test for name, test in list(globals().items()) if hasattr(test, "unbounded")}
COVERAGE_S = float(os.environ.get("SIAMSTREAM_FUZZ_SECONDS", "4"))  # of each fuzzer


@pytest.mark.parametrize("name", FUZZERS)
def test_guided_by_coverage(request: pytest.FixtureRequest, name: str) -> None:
    """The fuzzers above once more, with inputs that libFuzzer derives from those which have reached new branches."""
    pytest.importorskip("atheris", reason="atheris has no wheel for this platform (setup.py)")
    test = FUZZERS[name].unbounded
    fixtures = {name: request.getfixturevalue(name) for name in inspect.signature(test).parameters}
    run_in_child(request, COVERAGE_S + SECONDS, lambda finish: fuzz(test, fixtures, COVERAGE_S, finish))
