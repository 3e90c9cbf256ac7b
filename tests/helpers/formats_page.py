"""The tables of docs/formats.md that say what becomes of each layout of a source, made by trying each.

    python -m tests.helpers.formats_page          # writes the tables into the page; a test compares them

Each row is one small source and what make_shards does with it: images, classes, refused entries, or the message.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError
from pipeline.common.text import printable
from pipeline.sharding.make_dataset import make_dataset
from pipeline.sharding.options import ShardingOptions
from tests.helpers.photos import image_bytes
from tools.make_shards import quoted

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"
JPEG, MASK = image_bytes(1, 16, 16), image_bytes(2, 16, 16, mode="L", encoding="PNG")
Row = tuple[str, Callable[[Path], str], dict[str, Any]]  # (layout, what makes it and gives SOURCE, options)


def folder(*names: str) -> Callable[[Path], str]:
    """A folder of files; those named like JPEGs are some."""

    def make(root: Path) -> str:
        for name in names:
            (root / "SOURCE" / name).parent.mkdir(parents=True, exist_ok=True)
            (root / "SOURCE" / name).write_bytes(JPEG if name.endswith((".jpg", ".jfif", ".JPG")) else b"x")
        return str(root / "SOURCE")

    return make


def tar(*names: str, mode: str = "w", scheme: str = "") -> Callable[[Path], str]:
    """A tar of members; of those that end in .tar the contents are two images. ``scheme``: "wds:" or nothing."""

    def make(root: Path) -> str:
        _write_tar(root / "SOURCE.tar", names, mode)
        return f"{scheme}{root / 'SOURCE.tar'}"

    return make


def _write_tar(path: Path, names: tuple[str, ...], mode: str = "w") -> None:
    contents = {".cls": b"1", ".txt": b"a word", ".png": MASK, ".json": b'{"kind": "cat", "y": 2}'}
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name in names:
            data = contents.get(Path(name).suffix, JPEG)
            if name.endswith(".tar"):
                inner = path.with_name("inner.tar")
                _write_tar(inner, ("1.jpg", "2.jpg"))
                data = inner.read_bytes()
                inner.unlink()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def class_tars(*names: str, members: tuple[str, ...] = ("1.jpg", "2.jpg")) -> Callable[[Path], str]:
    """A folder of tars."""

    def make(root: Path) -> str:
        (root / "SOURCE").mkdir()
        for name in names:
            _write_tar(root / "SOURCE" / name, members)
        return str(root / "SOURCE")

    return make


def twice(make: Callable[[Path], str]) -> Callable[[Path], str]:
    """A tar behind another tar in one file."""

    def made(root: Path) -> str:
        source = make(root)
        first = (root / "SOURCE.tar").read_bytes()
        _write_tar(root / "SOURCE.tar", ("z.jpg",))
        (root / "SOURCE.tar").write_bytes(first + (root / "SOURCE.tar").read_bytes())
        return source

    return made


def cut(make: Callable[[Path], str]) -> Callable[[Path], str]:
    """A tar of which only the first 1,200 bytes came."""

    def made(root: Path) -> str:
        source = make(root)
        data = (root / "SOURCE.tar").read_bytes()
        (root / "SOURCE.tar").write_bytes(data[:1200])
        return source

    return made


def zipped(*names: str) -> Callable[[Path], str]:
    """A zip of images."""

    def make(root: Path) -> str:
        with zipfile.ZipFile(root / "SOURCE.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name in names:
                archive.writestr(zipfile.ZipInfo(name), JPEG, zipfile.ZIP_DEFLATED)
        return str(root / "SOURCE.zip")

    return make


def encrypted(make: Callable[[Path], str]) -> Callable[[Path], str]:
    """A zip whose first member says that it is encrypted."""

    def made(root: Path) -> str:
        source = make(root)
        data = bytearray(Path(source).read_bytes())
        data[data.index(b"PK\1\2") + 8] |= 1
        Path(source).write_bytes(data)
        return source

    return made


def labels(content: str) -> Callable[[Path], str]:
    """A folder of a.jpg, b.jpg, c.jpg beside labels.csv."""

    def make(root: Path) -> str:
        (root / "labels.csv").write_text(content)
        return folder("a.jpg", "b.jpg", "c.jpg")(root)

    return make


def parquet(features: dict[str, Any] | None = None, **files: dict[str, Any]) -> Callable[[Path], str]:
    """A folder of parquet files; ``__`` in a file's name stands for a slash, ``_`` before a digit for a hyphen."""

    def make(root: Path) -> str:
        import pyarrow as pa
        import pyarrow.parquet as pq

        for name, columns in files.items():
            path = root / "SOURCE" / (re.sub(r"_(?=\d|of|train|test)", "-", name.replace("__", "/")) + ".parquet")
            path.parent.mkdir(parents=True, exist_ok=True)
            table = pa.table(columns)
            if features is not None:
                table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
            pq.write_table(table, path)
        return str(root / "SOURCE")

    return make


IMAGES = [{"bytes": JPEG, "path": f"{n}.jpg"} for n in range(2)]
MASKS = [{"bytes": MASK, "path": f"{n}.png"} for n in range(2)]
ABC = {"labels": "labels.csv"}  # made absolute when it is tried
LABELLED = {"image": IMAGES, "label": [0, 1]}
NAMED = {"breed": {"names": ["pug", "cat"], "_type": "ClassLabel"}}

TABLES: dict[str, list[Row]] = {
    "folders": [
        ("`cat/1.jpg dog/2.jpg`", folder("cat/1.jpg", "dog/2.jpg"), {}),
        ("`1.jpg 2.JPG 3.jfif`", folder("1.jpg", "2.JPG", "3.jfif"), {}),
        ("`photos/1.jpg photos/2.jpg`", folder("photos/1.jpg", "photos/2.jpg"), {}),
        ("`all/cat/1.jpg all/dog/2.jpg`", folder("all/cat/1.jpg", "all/dog/2.jpg"), {}),
        ("`1.jpg cat/2.jpg`", folder("1.jpg", "cat/2.jpg"), {}),
        ("`Training/a/1.jpg Testing/a/2.jpg`", folder("Training/a/1.jpg", "Testing/a/2.jpg"), {}),
        ("`train/1.jpg bus/2.jpg`", folder("train/1.jpg", "bus/2.jpg"), {}),
        ("`a/1.jpg @eaDir/1.jpg lost+found/2.jpg`", folder("a/1.jpg", "@eaDir/1.jpg", "lost+found/2.jpg"), {}),
        ("`1.jpg 2.heic 3.heic 4.mp4`", folder("1.jpg", "2.heic", "3.heic", "4.mp4"), {}),
        ("a folder of `cat.tar dog.tar`", class_tars("cat.tar", "dog.tar"), {}),
        ("a folder of `00000.tar 00001.tar`", class_tars("00000.tar", "00001.tar"), {}),
        ("a tar of `cat/1.jpg dog/2.jpg`", tar("cat/1.jpg", "dog/2.jpg"), {}),
        ("the same, compressed by gzip", tar("cat/1.jpg", "dog/2.jpg", mode="w:gz"), {}),
        ("a tar of `cat.tar dog.tar`", tar("cat.tar", "dog.tar"), {}),
        ("a tar with another behind it", twice(tar("x.jpg")), {}),
        ("a tar that was cut off", cut(tar("x.jpg", "y.jpg")), {}),
        ("a zip of `cat/1.jpg dog/2.jpg`", zipped("cat/1.jpg", "dog/2.jpg"), {}),
        ("a zip of `../1.jpg 2.jpg`", zipped("../1.jpg", "2.jpg"), {}),
        ("a zip with an encrypted member", encrypted(zipped("1.jpg", "2.jpg")), {}),
    ],
    "labels": [
        ("`a.jpg,cat` `b.jpg,dog` `c.jpg,cat`", labels("a.jpg,cat\nb.jpg,dog\nc.jpg,cat\n"), ABC),
        ("the same with `;`, tabs, `\\|` or blanks", labels("a.jpg;cat\nb.jpg;dog\nc.jpg;cat\n"), ABC),
        ("`filename,label`, then the lines", labels("filename,label\na.jpg,cat\nb.jpg,dog\nc.jpg,cat\n"), ABC),
        ("`id,width,class` `a,64,cat` ...", labels("id,width,class\na,64,cat\nb,32,dog\nc,64,cat\n"), ABC),
        ('`a.jpg,"crane, bird"` ...', labels('a.jpg,"crane, bird"\nb.jpg,"crane, machine"\nc.jpg,dog\n'), ABC),
        ("`a.jpg great white shark` ...", labels("a.jpg great white shark\nb.jpg tabby cat\nc.jpg tabby cat\n"), ABC),
        (r"`./a.jpg,cat` `set\b.jpg,dog`", labels("./a.jpg,cat\nset\\b.jpg,dog\nc.jpg,cat\n"), ABC),
        ("`a.jpg,10` `b.jpg,9` `c.jpg,10`", labels("a.jpg,10\nb.jpg,9\nc.jpg,10\n"), ABC),
        ("`cat` `dog` `cat`: a class per line", labels("cat\ndog\ncat\n"), ABC),
        ("`b.jpg,dog` alone", labels("b.jpg,dog\n"), ABC),
        ("`image,mood,age` ..., `--label-column mood`",
         labels("image,mood,age\na.jpg,sad,1\nb.jpg,glad,2\nc.jpg,sad,3\n"), {**ABC, "label_column": "mood"}),
        ("`image,mood,age` ...", labels("image,mood,age\na.jpg,sad,1\nb.jpg,glad,2\nc.jpg,sad,3\n"), ABC),
        ("`image,cat,dog` `a.jpg,1,0` ...", labels("image,cat,dog\na.jpg,1,0\nb.jpg,0,1\nc.jpg,1,0\n"), ABC),
        ("`image,caption` ...", labels("image,caption\na.jpg,a cat\nb.jpg,a dog\nc.jpg,a cat\n"), ABC),
        ("`a.jpg,cat` `b.jpg,`", labels("a.jpg,cat\nb.jpg,\n"), ABC),
        ("`a.jpg,cat` `x/a.jpg,dog`", labels("a.jpg,cat\nx/a.jpg,dog\n"), ABC),
        ("`a.jpg:cat` `b.jpg:dog` `c.jpg:cat`", labels("a.jpg:cat\nb.jpg:dog\nc.jpg:cat\n"), ABC),
        ("`a.jpg,cat` `b.jpg,crane, bird`", labels("a.jpg,cat\nb.jpg,crane, bird\n"), ABC),
    ],
    "parquet": [
        ("`data/train-00000-of-00002.parquet` ..., column `label`",
         parquet(data__train_00000_of_00002=LABELLED, data__train_00001_of_00002=LABELLED), {}),
        ("the same without the second file", parquet(data__train_00000_of_00002=LABELLED), {}),
        ("no label column", parquet(train_00000_of_00001={"image": IMAGES}), {}),
        ("`my-train.parquet my-test.parquet`", parquet(my_train=LABELLED, my_test=LABELLED), {}),
        ("the same, `--split test`", parquet(my_train=LABELLED, my_test=LABELLED), {"split": "test"}),
        ("`default/train/0000.parquet`", parquet(default__train__0000=LABELLED), {}),
        ("a ClassLabel called `breed`", parquet(NAMED, x={"image": IMAGES, "breed": [1, 0]}), {}),
        ("labels that are words", parquet(x={"image": IMAGES, "label": ["cat", "dog"]}), {}),
        ("labels `1.0` and null", parquet(x={"image": IMAGES, "label": [1.0, None]}), {}),
        ("a column `mask` before `image`", parquet(x={"mask": MASKS, "image": IMAGES}), {}),
        ("a label 50,000,000", parquet(x={"image": IMAGES, "label": [50_000_000, 1]}), {}),
        ("a label 0.5", parquet(x={"image": IMAGES, "label": [0.5, 1.0]}), {}),
        ("lists as labels", parquet(x={"image": IMAGES, "label": [[0], [1]]}), {}),
        ("a second file without the label column", parquet(x_0=LABELLED, x_1={"image": IMAGES}), {}),
        ("URLs instead of images", parquet(x={"url": ["https://x/1.jpg"]}), {}),
    ],
    "webdataset": [
        ("`1.jpg 1.cls 2.jpg 2.cls`", tar("1.jpg", "1.cls", "2.jpg", "2.cls", scheme="wds:"), {}),
        ("`1.jpg 2.jpg 2.cls 1.cls`", tar("1.jpg", "2.jpg", "2.cls", "1.cls", scheme="wds:"), {}),
        ("`1.jpg 1.json`, `--wds-label-key kind`", tar("1.jpg", "1.json", scheme="wds:"), {"wds_label_key": "kind"}),
        ("`1.depth.png 1.jpg`", tar("1.depth.png", "1.jpg", scheme="wds:"), {}),
        ("`1.left.jpg 1.right.jpg`, `--wds-image-ext right.jpg`",
         tar("1.left.jpg", "1.right.jpg", scheme="wds:"), {"wds_image_ext": "right.jpg"}),
        ("`img.v1.0.jpg img.v2.0.jpg`", tar("img.v1.0.jpg", "img.v2.0.jpg", scheme="wds:"), {}),
        ("`1.jpg 2.txt`", tar("1.jpg", "2.txt", scheme="wds:"), {}),
        ("`1.jpg 1.jpg`", tar("1.jpg", "1.jpg", scheme="wds:"), {}),
        ("a tar with another behind it", twice(tar("x.jpg", scheme="wds:")), {}),
        ("a tar compressed by gzip", tar("1.jpg", mode="w:gz", scheme="wds:"), {}),
    ],
}  # fmt: skip


def outcome(make: Callable[[Path], str], options: dict[str, Any]) -> str:
    """What make_shards does with a source, in one line."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        try:
            source = make(root)
            if options.get("labels") == "labels.csv":
                options = {**options, "labels": str(root / "labels.csv")}
            chosen = ShardingOptions(verify="header", **options)
            made = make_dataset(source, root / "out", chosen, quiet=True, in_process=True)
        except UserError as error:
            return f"refused: {_plain(str(error), root)}"
        classes = ", ".join(map(quoted, made.class_names)) if made.classes else "none"
        origin = f" from {made.labels_from}" if made.labels_from else ""
        parts = [f"{made.images} images, classes{origin}: {classes}"]
        parts += [f"{made.unlabelled} without a label"] if made.classes and made.unlabelled else []
        reasons = Counter(made.rejected)
        parts += [f"left out: {count} ({reason})" for reason, count in sorted(reasons.items())]
        return _plain("; ".join([*parts, *made.notes]), root)


def _plain(text: str, root: Path) -> str:
    return printable(text).replace(f"{root}/", "").replace("|", "\\|")


def table(name: str) -> str:
    """One table in Markdown."""
    rows = [f"| {layout} | {outcome(make, options)} |" for layout, make, options in TABLES[name]]
    return "\n".join(["| layout | what becomes of it |", "|-|-|", *rows])


def section(page: str, name: str) -> tuple[int, int]:
    """Where table ``name`` lies in the page."""
    start, end = f"<!-- table: {name} -->\n", f"\n<!-- end: {name} -->"
    return page.index(start) + len(start), page.index(end)


def main() -> None:
    """Write the tables into the page."""
    page = PAGE.read_text()
    for name in TABLES:
        start, end = section(page, name)
        page = page[:start] + table(name) + page[end:]
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
