"""tools/embed.py and tools/neighbours.py: one row a sample whatever happens, and the right neighbours."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

import train.openmp  # noqa: F401
from pipeline.common.errors import UserError
from pipeline.dataset.dataset import ShardSet
from tests.helpers.damage import change_bytes, copy_dataset
from tests.helpers.sessions import ROOT
from tests.helpers.toy_runs import call
from tools import embed as embed_module
from tools import neighbours
from tools.embedding import search, store
from tools.embedding.store import Embeddings, escaped
from train.evaluation.features import EncoderConfig, open_frozen

ENCODER = "untrained:resnet_tiny"
FLAGS = ("--image-size", "32", "--device", "cpu", "--backend", "torchvision", "--threads", "1")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (store, embed_module):
        monkeypatch.setattr(module, "BLOCK", 16)
    monkeypatch.setattr(embed_module, "IMAGES_PER_PASS", 8)


def embed(monkeypatch: pytest.MonkeyPatch, data: Path, out: Path, *more: str) -> int:
    return call(monkeypatch, embed_module, ENCODER, str(data), str(out), *FLAGS, *more)


def direct(data: Path) -> np.ndarray:
    """The features without blocks, loader or files."""
    from pipeline.backends.reference import centre_crop, decode, normalise
    from pipeline.sampling.views import centre_crops

    encoder = open_frozen(EncoderConfig(ENCODER, image_size=32), torch.device("cpu"))
    dataset = ShardSet.open(data)
    crops = centre_crops(32, dataset.sizes(np.arange(len(dataset))))
    views = [normalise(centre_crop(decode(dataset.read(i)), crops, i, 32), encoder.recipe) for i in range(len(dataset))]
    with torch.no_grad():
        return encoder.backbone(torch.stack(views)).numpy()


def test_names_are_the_paths_in_the_source(
    photo_folder: Path, photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert embed(monkeypatch, photo_dataset_path, tmp_path / "out") == 0
    paths = [str(path.relative_to(photo_folder)) for path in photo_folder.rglob("*") if path.is_file()]
    assert sorted(Embeddings(tmp_path / "out").names) == sorted(paths)


def test_row_i_is_sample_i(photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert embed(monkeypatch, photo_dataset_path, tmp_path / "out") == 0
    made = Embeddings(tmp_path / "out")
    np.testing.assert_allclose(made.vectors, direct(photo_dataset_path), rtol=1e-4, atol=1e-5)
    dataset = ShardSet.open(photo_dataset_path)
    assert made.names == embed_module.sample_names(dataset, np.arange(48))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "_embeddings.json",
        "embeddings.npy",
        "names.txt",
    ]


def test_normalised_half_precision(photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert embed(monkeypatch, photo_dataset_path, tmp_path / "out", "--dtype", "float16", "--normalise") == 0
    made = Embeddings(tmp_path / "out")
    whole = direct(photo_dataset_path)
    assert made.vectors.dtype == np.float16
    expected = whole / np.linalg.norm(whole, axis=1, keepdims=True)
    np.testing.assert_allclose(made.vectors, expected, atol=1e-3)


def test_an_interrupted_job_goes_on(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embed(monkeypatch, photo_dataset_path, tmp_path / "whole") == 0
    write, written = store.EmbeddingWriter.write, []

    def interrupted(self: store.EmbeddingWriter, block: store.Block) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(block.number)
        write(self, block)

    with monkeypatch.context() as patch:
        patch.setattr(store.EmbeddingWriter, "write", interrupted)
        assert embed(monkeypatch, photo_dataset_path, tmp_path / "out") == 130
    with pytest.raises(UserError, match="half-written"):
        Embeddings(tmp_path / "out")
    capsys.readouterr()
    assert embed(monkeypatch, photo_dataset_path, tmp_path / "out") == 0
    assert "going on: 2 of 3 blocks" in capsys.readouterr().out
    for name in ("embeddings.npy", "names.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert embed(monkeypatch, photo_dataset_path, tmp_path / "out") == 0
    assert "complete already" in capsys.readouterr().out


def test_one_process_at_a_time_writes_a_folder(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, codes = store.EmbeddingWriter.write, []

    def meanwhile(self: store.EmbeddingWriter, block: store.Block) -> None:
        if not codes:
            codes.append(-1)
            codes.append(embed(monkeypatch, photo_dataset_path, tmp_path / "out", "--overwrite"))
            codes.append(embed(monkeypatch, photo_dataset_path, tmp_path / "out"))
        write(self, block)

    with monkeypatch.context() as patch:
        patch.setattr(store.EmbeddingWriter, "write", meanwhile)
        assert embed(monkeypatch, photo_dataset_path, tmp_path / "out") == 0
    assert codes == [-1, 2, 2]
    assert capsys.readouterr().err.count(f"is writing to {tmp_path / 'out'}: wait for it") == 2
    assert len(Embeddings(tmp_path / "out").names) == 48
    assert not (tmp_path / "out" / ".partial").exists()


def test_overwrite_deletes_embeddings_alone(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert embed(monkeypatch, photo_dataset_path, out, "--format", "webdataset") == 0
    (out / "thesis.txt").write_text("precious")
    (out / "pictures").mkdir()
    assert embed(monkeypatch, photo_dataset_path, out, "--overwrite") == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "_embeddings.json",
        "embeddings.npy",
        "names.txt",
        "pictures",
        "thesis.txt",
    ]


def test_an_unfinished_dataset_is_no_unfinished_embedding(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = tmp_path / "out" / ".partial"
    begun.mkdir(parents=True)
    (begun / "job.json").write_text("{}")
    assert embed(monkeypatch, photo_dataset_path, tmp_path / "out", "--overwrite") == 2
    assert "holds other files" in capsys.readouterr().err
    assert [path.name for path in begun.iterdir()] == ["job.json"]


def test_no_array_is_written_through_a_link(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = tmp_path / "out" / ".partial"
    begun.mkdir(parents=True)
    (tmp_path / "precious").write_text("precious")
    (begun / "embeddings.npy").symlink_to(tmp_path / "precious")
    assert embed(monkeypatch, photo_dataset_path, tmp_path / "out") == 0
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_bad_image_is_a_named_row_of_nan(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = copy_dataset(photo_dataset_path, tmp_path / "data")
    dataset = ShardSet.open(data)
    name = embed_module.sample_names(dataset, np.array([21]))[0]
    change_bytes(data, [21])
    assert embed(monkeypatch, data, tmp_path / "out") == 0
    assert embed(monkeypatch, photo_dataset_path, tmp_path / "whole") == 0
    made, whole = Embeddings(tmp_path / "out"), Embeddings(tmp_path / "whole")
    assert np.isnan(made.vectors[21]).all()
    assert made.names[21] == name
    assert made.bad == {21}
    others = np.arange(48) != 21
    np.testing.assert_array_equal(made.vectors[others], whole.vectors[others])


def test_two_ranks_write_the_same_file(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert embed(monkeypatch, photo_dataset_path, tmp_path / "one") == 0
    script = tmp_path / "two.py"
    script.write_text(
        "import train.openmp\nfrom pipeline.common.errors import exit_on_user_error\n"
        "from tools import embed\nfrom tools.embedding import store\n"
        "store.BLOCK = embed.BLOCK = 16\nembed.IMAGES_PER_PASS = 8\nexit_on_user_error(embed.main)\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    command = [*launcher, ENCODER, str(photo_dataset_path), str(tmp_path / "two"), *FLAGS]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    one, two = Embeddings(tmp_path / "one"), Embeddings(tmp_path / "two")
    np.testing.assert_allclose(two.vectors, one.vectors, rtol=1e-5, atol=1e-6)  # threads may sum in another order
    assert two.names == one.names


def test_parquet_and_tars_hold_the_same(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    assert embed(monkeypatch, photo_dataset_path, tmp_path / "npy") == 0
    assert embed(monkeypatch, photo_dataset_path, tmp_path / "parquet", "--format", "parquet") == 0
    assert embed(monkeypatch, photo_dataset_path, tmp_path / "tars", "--format", "webdataset") == 0
    whole = Embeddings(tmp_path / "npy")
    labels = ShardSet.open(photo_dataset_path).labels(np.arange(48)).tolist()
    table = parquet.read_table(tmp_path / "parquet")
    assert table.column("id").to_pylist() == list(range(48))
    assert table.column("name").to_pylist() == whole.names
    assert table.column("label").to_pylist() == labels
    np.testing.assert_array_equal(np.array(table.column("vector").to_pylist(), np.float32), whole.vectors)
    seen = []
    for path in sorted((tmp_path / "tars").glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name in sorted(name for name in members if name.endswith(".json")):
            about = json.loads(members[name])
            vector = np.load(io.BytesIO(members[name.replace(".json", ".npy")]))
            np.testing.assert_array_equal(vector, whole.vectors[about["id"]])
            seen.append((about["id"], about["name"], about["label"]))
    assert seen == list(zip(range(48), whole.names, labels, strict=True))


def test_the_projector_is_the_model_s_own() -> None:
    from model.heads import Projector

    for layers, places in ((1, "all"), (3, "all"), (2, "none"), (3, "hidden")):
        projector = Projector(6, 5, 4, layers, places).train()  # type: ignore[arg-type]
        projector(torch.randn(20, 6))
        rebuilt = embed_module.sequential_of(projector.state_dict())
        x = torch.randn(7, 6)
        torch.testing.assert_close(rebuilt(x), projector.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--features", "projector"), "holds no projector"),
        (("--image-size", "0"), "image-size"),
    ],
)
def test_mistakes_end_with_one_message(
    photo_dataset_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    message: str,
) -> None:
    assert embed(monkeypatch, photo_dataset_path, tmp_path / "out", *more) == 2
    assert message in capsys.readouterr().err


def test_a_folder_of_something_else_is_left_alone(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("precious")
    assert embed(monkeypatch, photo_dataset_path, tmp_path, "--overwrite") == 2
    assert "holds other files" in capsys.readouterr().err
    assert embed(monkeypatch, photo_dataset_path, tmp_path / "out") == 0
    assert embed(monkeypatch, photo_dataset_path, tmp_path / "out", "--normalise") == 2
    assert "normalised: there False, now True" in capsys.readouterr().err


SHOWN = {
    "a b/ü.jpg": "a b/ü.jpg",
    "a\nb": "a\\nb",
    "\x1b[2J": "\\x1b[2J",
    "\udcff": "\\udcff",
}


@pytest.mark.parametrize(("name", "shown"), SHOWN.items())
def test_names_stand_on_one_line_and_move_no_cursor(name: str, shown: str) -> None:
    assert escaped(name) == shown


@pytest.fixture
def embedded(photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    assert embed(monkeypatch, photo_dataset_path, tmp_path / "embedded") == 0
    return tmp_path / "embedded"


@pytest.mark.parametrize("at_once", [5, 1000])
def test_the_nearest_are_those_of_all_rows(embedded: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(search, "ROWS_AT_ONCE", at_once)
    embeddings = Embeddings(embedded)
    unit = embeddings.vectors / np.linalg.norm(embeddings.vectors, axis=1, keepdims=True)
    expected = np.argsort(-(unit[:6] @ unit.T), axis=1, kind="stable")[:, :4]
    similarity, rows = search.nearest(embeddings, embeddings.vectors[:6], 4)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(similarity[:, 0], 1, atol=1e-6)


def test_faiss_agrees(embedded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    embeddings = Embeddings(embedded)
    _, exact = search.nearest(embeddings, embeddings.vectors[:4], 1)
    monkeypatch.setattr(search, "FAISS_FROM", 1)
    _, found = search.nearest(embeddings, embeddings.vectors[:4], 1)
    np.testing.assert_array_equal(found, exact)


def test_a_file_is_its_own_nearest(
    embedded: Path,
    photo_dataset_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "query.jpg").write_bytes(ShardSet.open(photo_dataset_path).read(17))
    names = Embeddings(embedded).names
    queries = ("--query", str(tmp_path / "query.jpg"), "--query", "17", "--query", names[17])
    out = tmp_path / "grid.png"
    assert call(monkeypatch, neighbours, str(embedded), str(photo_dataset_path), str(out), *queries, "--k", "3") == 0
    from_file, from_number, from_name, _ = capsys.readouterr().out.splitlines()
    assert f": 1.000 {names[17]}, " in from_file
    assert names[17] not in from_number.partition(": ")[2]
    assert from_number == from_name
    assert out.read_bytes().startswith(b"\x89PNG")


def test_duplicates_within_and_between(
    embedded: Path, photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [str(embedded), str(photo_dataset_path), str(tmp_path / "twins.png"), "--duplicates", "0.99"]
    assert call(monkeypatch, neighbours, *arguments) == 0
    with open(tmp_path / "twins.csv") as file:
        within = list(csv.DictReader(file))
    vectors = Embeddings(embedded).vectors
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = {(int(i), int(j)) for i, j in np.argwhere(np.triu(unit @ unit.T, 1) >= 0.99)}
    assert {(int(row["sample"]), int(row["other_sample"])) for row in within} == expected
    assert call(monkeypatch, neighbours, *arguments, "--against", str(embedded), str(photo_dataset_path)) == 0
    with open(tmp_path / "twins.csv") as file:
        between = {(int(row["sample"]), int(row["other_sample"])) for row in csv.DictReader(file)}
    assert between >= {(i, i) for i in range(48)} | expected


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--query", "99"), "numbered 0 .. 47"),
        (("--query", "no-such"), "no file, no name of the dataset"),
        (("--k", "0"), "--k 0"),
        (("--duplicates", "1.5"), "cosine similarity"),
        (("--against", "a", "b"), "--against goes with --duplicates"),
    ],
)
def test_mistakes_of_neighbours(
    embedded: Path,
    photo_dataset_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    message: str,
) -> None:
    arguments = [str(embedded), str(photo_dataset_path), str(tmp_path / "grid.png"), *more]
    assert call(monkeypatch, neighbours, *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("query", "message"),
    [("99", "numbered 0 .. 47"), ("no-such", "no file, no name of"), ("text.jpg", "cannot be read as an image")],
)
def test_a_wrong_query_is_refused_before_anything_is_embedded(
    photo_dataset_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    query: str,
    message: str,
) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(neighbours, "embed", lambda *_: pytest.fail("the dataset is embedded"))
    recorded = ShardSet.open(photo_dataset_path).names
    assert recorded is not None
    arguments = [ENCODER, str(photo_dataset_path), "grid.png", "--query", "47", "--query", recorded[3]]
    assert call(monkeypatch, neighbours, *arguments, "--query", query) == 2
    assert message in capsys.readouterr().err


def test_embeddings_of_another_dataset_are_refused(
    embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline.sharding.make_dataset import make_dataset

    make_dataset("synthetic:5", tmp_path / "other", quiet=True, in_process=True)
    assert call(monkeypatch, neighbours, str(embedded), str(tmp_path / "other"), str(tmp_path / "grid.png")) == 2
    assert "another dataset" in capsys.readouterr().err
