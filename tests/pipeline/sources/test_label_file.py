"""Label files as people have them: what is understood, and what is refused with its line."""

from __future__ import annotations

import codecs
import random
import unicodedata
from pathlib import Path

import pytest

from pipeline.common.errors import UserError
from pipeline.sharding.make_dataset import make_dataset
from pipeline.sharding.options import ShardingOptions
from pipeline.sources.labels import label_by_file
from pipeline.sources.open_source import open_source
from tests.helpers.photos import image_bytes
from tests.pipeline.sources.test_labels import listing

ABC = ("a.jpg", "b.jpg", "c.jpg")


def labelled(
    tmp_path: Path, content: str | bytes, *names: str, column: str | None = None, notes: list[str] | None = None
) -> dict[str, str | None]:
    """The class of each image."""
    file = tmp_path / "labels.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape"))
    found = label_by_file(listing(*(names or ABC)), file, (), column, notes)
    labels = [None if label < 0 else found.classes[label] for label in found.labels]
    return {found.name(index): labels[index] for index in range(len(found))}


CDC = {"a.jpg": "cat", "b.jpg": "dog", "c.jpg": "cat"}
UNDERSTOOD = {
    "semicolons": "a.jpg;cat\nb.jpg;dog\nc.jpg;cat\n",
    "tabs": "a.jpg\tcat\nb.jpg\tdog\nc.jpg\tcat\n",
    "pipes": "a.jpg|cat\nb.jpg|dog\nc.jpg|cat\n",
    "blanks": "a.jpg cat\nb.jpg   dog\nc.jpg cat\n",
    "commas and blanks": "a.jpg, cat\nb.jpg , dog\n c.jpg, cat\n",
    "Windows line ends": "filename,label\r\na.jpg,cat\r\nb.jpg,dog\r\nc.jpg,cat\r\n",
    "old Mac line ends": "a.jpg,cat\rb.jpg,dog\rc.jpg,cat",
    "blank lines": "\n\na.jpg,cat\n\nb.jpg,dog\n,\nc.jpg,cat\n\n",
    "Excel": "sep=;\nfilename;label\na.jpg;cat\nb.jpg;dog\nc.jpg;cat\n",
    "pandas' index": ",filename,label\n0,a.jpg,cat\n1,b.jpg,dog\n2,c.jpg,cat\n",
    "Kaggle's columns": "filename,width,height,class\na.jpg,64,48,cat\nb.jpg,64,48,dog\nc.jpg,32,48,cat\n",
    "a header in capitals": "Image_ID,Width,Category\na.jpg,1,cat\nb.jpg,2,dog\nc.jpg,3,cat\n",
    "ids without ending": "id,breed\na,cat\nb,dog\nc,cat\n",
    "an id beside the path": "id,path,target\n17,a.jpg,cat\n18,b.jpg,dog\n19,c.jpg,cat\n",
    "class before name": "label,image\ncat,a.jpg\ndog,b.jpg\ncat,c.jpg\n",
    "class before name without header": "cat,a.jpg\ndog,b.jpg\ncat,c.jpg\n",
    "an unknown header of two columns": "fotografia,especie\na.jpg,cat\nb.jpg,dog\nc.jpg,cat\n",
    "quoted cells": '"a.jpg","cat"\n"b.jpg","dog"\n"c.jpg","cat"\n',
    "quoted cells and blanks": '"a.jpg" "cat"\n"b.jpg"  "dog"\n"c.jpg" "cat"\n',
    "aligned columns with a header": "filename width class\na.jpg 64   cat\nb.jpg 128  dog\nc.jpg 32   cat\n",
    "./": "./a.jpg,cat\n./b.jpg,dog\n././c.jpg,cat\n",
    "folders that SOURCE is below": "data\\set\\a.jpg,cat\n/mnt/set/b.jpg,dog\nC:\\set\\c.jpg,cat\n",
    "one class a line": "cat\ndog\ncat\n",
    "one class a line with a header": "label\ncat\ndog\ncat\n",
    "the same row twice": "a.jpg,cat\nb.jpg,dog\nc.jpg,cat\na.jpg,cat\n",
    "other images too": "z.jpg,yak\na.jpg,cat\nb.jpg,dog\nc.jpg,cat\n",
}


@pytest.mark.parametrize("kind", UNDERSTOOD)
def test_files_of_every_layout(kind: str, tmp_path: Path) -> None:
    assert labelled(tmp_path, UNDERSTOOD[kind]) == CDC


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_encodings(encoding: str, tmp_path: Path) -> None:
    content = "filename,label\na.jpg,chat noir\nb.jpg,höhlenbär\nc.jpg,猫\n".encode(encoding)
    assert labelled(tmp_path, content) == {"a.jpg": "chat noir", "b.jpg": "höhlenbär", "c.jpg": "猫"}
    big = codecs.BOM_UTF16_BE + "a.jpg,x\nb.jpg,y\nc.jpg,x\n".encode("utf-16-be")
    assert labelled(tmp_path, big) == {"a.jpg": "x", "b.jpg": "y", "c.jpg": "x"}


def test_whole_names_with_blanks_and_delimiters(tmp_path: Path) -> None:
    sharks = "filename,label\na.jpg,great white shark\nb.jpg,great horned owl\nc.jpg,tabby cat\n"
    expected = {"a.jpg": "great white shark", "b.jpg": "great horned owl", "c.jpg": "tabby cat"}
    assert labelled(tmp_path, sharks) == expected
    assert labelled(tmp_path, sharks.replace("filename,label\n", "").replace(",", " ")) == expected
    cranes = 'filename,label\na.jpg,"crane, bird"\nb.jpg,"crane, machine"\nc.jpg,"the ""dog"""\n'
    expected = {"a.jpg": "crane, bird", "b.jpg": "crane, machine", "c.jpg": 'the "dog"'}
    assert labelled(tmp_path, cranes) == expected
    lines = labelled(tmp_path, '"crane, bird"\n"crane, machine"\ndog\n')
    assert list(lines.values()) == ["crane, bird", "crane, machine", "dog"]
    names = ("my dog, 1.jpg", "my cat 2.jpg", "x;y/my cat 3.jpg")
    content = 'my cat 2.jpg,cat\n"my dog, 1.jpg",dog\nx;y/my cat 3.jpg,cat\n'
    assert labelled(tmp_path, content, *names) == dict(zip(sorted(names), ("cat", "dog", "cat"), strict=True))
    blanks = "my cat 2.jpg  black cat\nmy dog, 1.jpg dog\nx;y/my cat 3.jpg black cat\n"
    assert list(labelled(tmp_path, blanks, *names).values()) == ["black cat", "dog", "black cat"]


def test_names_in_other_spellings(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "é/ü.jpg") for form in ("NFC", "NFD"))
    for in_file, in_source in ((composed, decomposed), (decomposed, composed)):
        assert labelled(tmp_path, f"{in_file},cat\n", in_source) == {in_source: "cat"}
    both = labelled(tmp_path, "a.jpg,caf\u00e9\nb.jpg,cafe\u0301\n", "a.jpg", "b.jpg")
    assert set(both.values()) == {"caf\u00e9"}
    assert labelled(tmp_path, "x\\a.jpg,cat\nx/b.jpg,dog\n", "x/a.jpg", "x/b.jpg") == {
        "x/a.jpg": "cat",
        "x/b.jpg": "dog",
    }
    raw = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    assert labelled(tmp_path, b"caf\xe9.jpg,cat\n", raw) == {raw: "cat"}


def test_numbers_are_in_natural_order(tmp_path: Path) -> None:
    for words in (("10", "9", "2"), ("2.0", "10.0", "9.5"), ("1", "-1", "1")):
        file = tmp_path / "n.csv"
        file.write_text("".join(f"{name},{word}\n" for name, word in zip(ABC, words, strict=True)))
        classes = label_by_file(listing(*ABC), file).classes
        assert classes == tuple(sorted(set(words), key=float))


def test_some_images_are_labelled(tmp_path: Path) -> None:
    notes: list[str] = []
    found = labelled(tmp_path, "b.jpg,dog\nq.jpg,yak\nr.jpg,yak\n", notes=notes)
    assert found == {"a.jpg": None, "b.jpg": "dog", "c.jpg": None}
    assert notes == ["2 lines of labels.csv name no image of SOURCE (the first is line 2: 'q.jpg')"]


def test_a_column_is_chosen(tmp_path: Path) -> None:
    content = "image,label,caption,mood\na.jpg,cat,a cat sits,1\nb.jpg,dog,dogs run,2\nc.jpg,cat,one more cat,1\n"
    assert labelled(tmp_path, content) == CDC
    for column in ("mood", "Mood", "4"):
        assert list(labelled(tmp_path, content, column=column).values()) == ["1", "2", "1"]
    assert labelled(tmp_path, content, column="caption")["a.jpg"] == "a cat sits"
    bare = "a.jpg,64,cat\nb.jpg,64,dog\nc.jpg,32,cat\n"
    assert labelled(tmp_path, bare, column="3") == CDC
    for column, message in (
        ("colour", "has no such columns; the columns are image, label, caption, mood"),
        ("5", "has no such columns"),
        ("image", "has the names of the images"),
    ):
        with pytest.raises(UserError, match=rf"--label-column {column}.*{message}"):
            labelled(tmp_path, content, column=column)
    with pytest.raises(UserError, match=r"--label-column 2: .* has one column"):
        labelled(tmp_path, "cat\ndog\ncat\n", column="2")


REFUSED = {
    "no class column": (
        "filename,width,height\na.jpg,64,48\nb.jpg,64,48\n",
        r"line 1: the columns filename, width, height",
    ),
    "no header": ("a.jpg,64,48,cat\nb.jpg,64,48,dog\n", r"line 1: 4 columns and no header"),
    "one-hot": (
        "image,MEL,NV,BCC\na.jpg,0.0,1.0,0.0\nb.jpg,1.0,0.0,0.0\n",
        r"line 1: .*\(MEL, NV, BCC\) hold only 0 and 1",
    ),
    "one-hot and blanks": ("a.jpg 0 1 0\nb.jpg 1 0 0\n", r"line 1: several values behind the name 'a.jpg'"),
    "attributes of CelebA": ("3\nBald Young\na.jpg -1 1\nb.jpg 1 1\nc.jpg 1 -1\n", r"line 3: several values behind"),
    "a box and blanks": ("a.jpg 64 48 cat\nb.jpg 32 48 dog\n", "line 1: several values behind"),
    "captions": ("image,caption\na.jpg,a dog\nb.jpg,two cats\n", "line 1: the column caption looks like captions"),
    "long captions": (
        "a.jpg,a dog on the beach\nb.jpg,two cats that sleep\nc.jpg,a red car in the rain\n",
        "most of them sentences",
    ),
    "measurements": ("a.jpg,0.37\nb.jpg,-1.5e3\nc.jpg,12.0\n", "3 classes for 3 images, most of them fractions"),
    "an object": ('{"a.jpg": "cat", "b.jpg": "dog", "c.jpg": "cat"}', "labels.csv is JSON: write it as lines"),
    "an array": ('[{"file_name": "a.jpg", "label": 1},\n{"file_name": "b.jpg", "label": 2}]', "labels.csv is JSON"),
    "lines of objects": ('{"file_name": "a.jpg", "label": 1}\n{"file_name": "b.jpg", "label": 2}\n', "is JSON"),
    "two class columns": (
        "filename,label,class_name\na.jpg,0,cat\nb.jpg,1,dog\n",
        "columns label, class_name may all be",
    ),
    "an empty class": ("a.jpg,cat\nb.jpg,\nc.jpg,cat\n", r"line 2: the class of 'b\.jpg' is empty"),
    "an empty quoted class": ('a.jpg,cat\nb.jpg,""\n', "line 2: the class of"),
    "no class behind a blank": ("a.jpg cat\nb.jpg\nc.jpg cat\n", "line 2: it has 1 columns, and others have 2"),
    "a row twice": ("a.jpg,cat\nb.jpg,dog\n./a.jpg,dog\n", r"line 3: 'a\.jpg' is 'dog', and 'cat' in line 1"),
    "a base name twice": ("x/a.jpg,cat\ny/a.jpg,dog\n", r"line 2: 'a\.jpg' is 'dog', and 'cat' in line 1"),
    "a delimiter that is not found": (
        "a.jpg:cat\nb.jpg:dog\nc.jpg:cat\n",
        r"line 1: 'a\.jpg:cat' holds the name of an image",
    ),
    "a delimiter behind ids": ("a=cat\nb=dog\nc=yak\n", "line 1: every line is a class of its own, as 'a=cat'"),
    "names of other images": (
        "p.jpg,cat\nq.jpg,dog\nr.jpg,cat\n",
        r"names no image of SOURCE \(line 1: 'p.jpg'; the first image: 'a",
    ),
    "a comma without quotes": (
        "a.jpg,cat\nb.jpg,crane, bird\nc.jpg,cat\n",
        "line 2: it has 3 columns, and others have 2: quote",
    ),
    "a quote without end": ('a.jpg,cat\nb.jpg,"dog\nc.jpg,cat\n', "line 2: .*quote"),
    "a quote in the middle": ('a.jpg,cat\nb.jpg,"dog" x\n', "line 2: .*check its quotes"),
    "too few lines": ("cat\ndog\n", "2 labels for 3 images"),
    "two spellings of a number": ("a.jpg,1\nb.jpg,01\n", "'01' and '1', which are one number|'1' and '01'"),
    "-1 for none": ("a.jpg,-1\nb.jpg,0\nc.jpg,1\n", "class -1 beside 0: leave images without a class out"),
    "nothing": ("", "is empty"),
    "blanks only": (" \n\t\n,\n", "is empty"),
    "not UTF-8": (b"a.jpg,caf\xe9\nb.jpg,dog\n", r"line 1: the class 'caf\\udce9' is not UTF-8"),
    "binary": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is no text file"),
    "half of UTF-16": (codecs.BOM_UTF16_LE + b"a\0b", "damaged utf-16-le text"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_clear_is_refused_with_its_line(kind: str, tmp_path: Path) -> None:
    content, message = REFUSED[kind]
    with pytest.raises(UserError, match=rf"labels\.csv.*{message}|{message}"):
        labelled(tmp_path, content)


def test_a_name_that_several_images_have(tmp_path: Path) -> None:
    names = ("x/a.jpg", "y/a.jpg", "z/b.jpg", "z/b.png")
    for content, message in (
        ("x/a.jpg,cat\na.jpg,dog\n", r"line 2: 'a\.jpg' may be 'x/a\.jpg' and 'y/a\.jpg'"),
        ("z/b,cat\n", r"line 1: 'z/b' may be 'z/b\.jpg' and 'z/b\.png'"),
    ):
        with pytest.raises(UserError, match=message):
            labelled(tmp_path, content, *names)
    assert labelled(tmp_path, "x/a.jpg,cat\ny/a.jpg,dog\nb.png,cat\n", *names)["z/b.png"] == "cat"
    flat = labelled(tmp_path, "a.jpg,cat\nx/a.jpg,dog\n", "a.jpg", "x/a.jpg")
    assert flat == {"a.jpg": "cat", "x/a.jpg": "dog"}


def test_columns_of_sources_without_files_of_labels(photo_folder: Path, tmp_path: Path) -> None:
    for labels in ("auto", "none"):
        with pytest.raises(UserError, match="--label-column"):
            open_source(str(photo_folder), tmp_path, labels=labels, label_column="label")


@pytest.mark.parametrize("seed", range(150))
def test_any_text_is_understood_or_refused(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    content = bytearray(rng.choice(list(UNDERSTOOD.values())).encode(rng.choice(["utf-8", "utf-16"])))
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(content))
        content[at : at + rng.randrange(3)] = rng.choice(
            [b'"', b",", b";", b"\n", b"\0", b"\xff", b" ", b"a.jpg", b"\r"]
        )
    try:
        found = labelled(tmp_path, bytes(content))
    except UserError:
        return
    assert set(found) == set(ABC)


@pytest.mark.parametrize("first", ["IMG 1.jpg", "photo 7.jpg", "file name.jpg"])
def test_an_image_whose_name_begins_like_a_header_keeps_its_label(first: str, tmp_path: Path) -> None:
    source = tmp_path / "photos"
    source.mkdir()
    for number, name in enumerate((first, "other.jpg", "third.jpg")):
        (source / name).write_bytes(image_bytes(number))
    (tmp_path / "labels.csv").write_text(f"{first},cat\nother.jpg,dog\nthird.jpg,cat\n")
    options = ShardingOptions(labels=str(tmp_path / "labels.csv"))
    made = make_dataset(str(source), tmp_path / "out", options, quiet=True, in_process=True)
    assert (made.images, made.unlabelled, made.class_names) == (3, 0, ("cat", "dog"))
