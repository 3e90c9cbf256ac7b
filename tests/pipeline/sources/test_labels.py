"""Ground-truth files, ImageNet's devkit and class lists of other datasets."""

from __future__ import annotations

import base64
import io
import random
import struct
import tarfile
import zlib
from pathlib import Path

import pytest

from pipeline.common.errors import UserError
from pipeline.sources.labels import adopt_classes, label_by_file, label_by_folder
from pipeline.sources.listing import Listing, ListingBuilder
from pipeline.sources.matlab import read_struct_array

# A meta.mat with the fields of ImageNet's devkit and four synsets, written by scipy.io.savemat (compressed):
# ids 1 to 4 are n02119789, n02100735, n01440764 and the inner node n99999999.
META_MAT = (
    "TUFUTEFCIDUuMCBNQVQtZmlsZSBQbGF0Zm9ybTogcG9zaXgsIENyZWF0ZWQgb246IFN1biBOb3YgMjIgMTY6MDU6MTkgMjAyNgAAAAAAAAAAAAAA"
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAABSU0PAAAAPQEAAHic42NgYDjBwcDABqSBFAMTAwSwQvksQMwIxexAXFyZ"
    "V5xaUgyUZ2EQhIp3ALGnT3BYkLORgaFRvKcLyIBwPwgNB+X5RSnFyALpOfnFKAJ5pbnxyRmZOSlFqXlgARQOzIy81JL4jNTM9IwSqJaSosTMvPjM"
    "3MT01GIGPqCgAQPCP9xo/mFEwgxg/zGB2SB9Dkj6WLDo40TSJwDl5xkYGRpamltYQsWJMYcDizmJOgpp+RUKh1cimWNAwBxGFHMYGdKh+iyQ9PER"
    "0McDFYcBdHvZsOhnQKI5kfRRai85+kVYsevH5m5k/Zyo9jtQEv8GBubGpkj+IGTOaPzTJv5JzffMDJTke0MTEwNzMxMk9xMyZzTeB1u+FyA/31tC"
    "AZI/CJkzGOMfVt+jux+bfiY0/QJIfGRzBjI9AAB1GEvH"
)
VALIDATION = ("ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000002.JPEG", "ILSVRC2012_val_00000003.JPEG")


def listing(*names: str) -> Listing:
    builder = ListingBuilder("test")
    for name in names:
        builder.add(name, 0, 1)
    return builder.build()


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def devkit(path: Path, truth: str) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in (
            ("ILSVRC2012_devkit_t12/data/meta.mat", base64.b64decode(META_MAT)),
            ("ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth.encode()),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_the_devkit_numbers_become_the_training_folders_classes(tmp_path: Path) -> None:
    kit = devkit(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", "1\n3\n1\n")
    labelled = label_by_file(listing(*VALIDATION), kit)
    assert [labelled.classes[label] for label in labelled.labels] == ["n02119789", "n01440764", "n02119789"]
    assert labelled.classes == ("n01440764", "n02119789")  # sorted, as the folders are
    train = ("n01440764", "n02100735", "n02119789")
    assert label_by_file(listing(*VALIDATION), kit, train).labels.tolist() == [2, 0, 2]
    with pytest.raises(UserError, match="2 labels for 3 images"):
        label_by_file(listing(*VALIDATION), devkit(tmp_path / "short.tar.gz", "1\n3\n"))


def test_ilsvrcs_own_numbers_are_not_taken_for_labels(tmp_path: Path) -> None:
    truth = write(tmp_path / "ILSVRC2012_validation_ground_truth.txt", "1\n3\n1\n")
    with pytest.raises(UserError, match="give the devkit itself"):
        label_by_file(listing(*VALIDATION), truth)


def test_a_class_a_line_in_the_order_of_sorted_names(tmp_path: Path) -> None:
    labelled = label_by_file(listing("b.jpg", "a.jpg"), write(tmp_path / "l.txt", "dog\ncat\n"))
    assert (labelled.classes, labelled.labels.tolist()) == (("cat", "dog"), [1, 0])  # a.jpg is a dog
    numbers = label_by_file(listing("b.jpg", "a.jpg"), write(tmp_path / "n.txt", "10\n9\n"))
    assert (numbers.classes, numbers.labels.tolist()) == (("9", "10"), [1, 0])


@pytest.mark.parametrize("line", ["{0}.jpg {1}", "{0},{1} 85 1 499 272", "x/{0}.jpg\t{1}"])
def test_lines_with_names(line: str, tmp_path: Path) -> None:
    text = "ImageId,PredictionString\n" + "\n".join(line.format(*pair) for pair in (("b", "dog"), ("a", "cat"))) + "\n"
    labelled = label_by_file(listing("x/a.jpg", "x/b.jpg"), write(tmp_path / "l.csv", text))
    assert (labelled.classes, labelled.labels.tolist()) == (("cat", "dog"), [0, 1])
    partial = label_by_file(listing("x/a.jpg", "x/c.jpg"), tmp_path / "l.csv")
    assert (partial.classes, partial.labels.tolist()) == (("cat",), [0, -1])


def test_numbers_index_a_known_class_list_and_unknown_classes_are_refused(tmp_path: Path) -> None:
    names = listing("a.jpg", "b.jpg")
    assert label_by_file(names, write(tmp_path / "n", "1\n0\n"), ("cat", "dog")).labels.tolist() == [1, 0]
    with pytest.raises(UserError, match="class '2', which is not one of the 2 classes"):
        label_by_file(names, write(tmp_path / "m", "1\n2\n"), ("cat", "dog"))
    with pytest.raises(UserError, match="no such file"):
        label_by_file(names, tmp_path / "absent")


def test_classes_are_taken_over_from_another_dataset(photo_dataset_path: Path) -> None:
    some = label_by_folder(listing("dog/1.jpg", "newt/2.jpg"), "test", "auto")
    adopted = adopt_classes(some, photo_dataset_path)
    assert (adopted.classes, adopted.labels.tolist()) == (("cat", "dog", "fish", "newt"), [1, 3])
    with pytest.raises(UserError, match="class 'yak' is not one of the 4 classes"):
        adopt_classes(label_by_folder(listing("dog/1.jpg", "yak/2.jpg"), "test", "auto"), photo_dataset_path)


def test_matlab_structs() -> None:
    synsets = read_struct_array(base64.b64decode(META_MAT), "synsets")
    assert [s["WNID"] for s in synsets] == ["n02119789", "n02100735", "n01440764", "n99999999"]
    assert [s["ILSVRC2012_ID"] for s in synsets] == [(1,), (2.0,), (3,), (4.0,)]  # uint16 and double in turn
    assert (synsets[3]["children"], synsets[0]["words"]) == ((1, 2), "a, fox é")


@pytest.mark.parametrize("damage", [lambda d: d[:300], lambda d: b"", lambda d: d[:150] + bytes(50) + d[200:]])
def test_a_damaged_matlab_file_is_a_users_error(damage: object) -> None:
    with pytest.raises(UserError, match="MATLAB"):
        read_struct_array(damage(base64.b64decode(META_MAT)), "synsets")  # type: ignore[operator]


def kit_of(path: Path, truth: str = "1\n3\n1\n", meta: bytes | None = None, mode: str = "w:gz") -> Path:
    """A devkit with another meta.mat."""
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in (
            ("kit/data/meta.mat", base64.b64decode(META_MAT) if meta is None else meta),
            ("kit/data/ILSVRC2012_validation_ground_truth.txt", truth.encode()),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_a_plain_devkit_is_read_too(tmp_path: Path) -> None:
    labelled = label_by_file(listing(*VALIDATION), kit_of(tmp_path / "kit.tar", mode="w"))
    assert [labelled.classes[label] for label in labelled.labels] == ["n02119789", "n01440764", "n02119789"]


def bomb() -> bytes:
    """A meta.mat whose one element is 200 MB of zeros, compressed."""
    content = zlib.compress(bytes(200 << 20), 1)
    return base64.b64decode(META_MAT)[:128] + struct.pack("<II", 15, len(content)) + content


DAMAGED_KITS = {
    "a number that is none": ({"truth": "1\nx\n1\n"}, "is damaged"),
    "a number of no class": ({"truth": "1\n9999\n1\n"}, "is damaged"),
    "a number too large": ({"truth": "1\n" + "9" * 5000 + "\n1\n"}, "is damaged"),
    "too few": ({"truth": "1\n"}, "has 1 labels for 3 images"),
    "no meta.mat": ({"meta": b""}, "MATLAB"),
    "half of meta.mat": ({"meta": base64.b64decode(META_MAT)[:200]}, "MATLAB"),
    "a bomb": ({"meta": bomb()}, "MATLAB"),
}


@pytest.mark.parametrize("kind", DAMAGED_KITS)
def test_a_damaged_devkit_is_a_users_error(kind: str, tmp_path: Path) -> None:
    changes, message = DAMAGED_KITS[kind]
    with pytest.raises(UserError, match=message):
        label_by_file(listing(*VALIDATION), kit_of(tmp_path / "kit.tar.gz", **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(60))
def test_devkits_of_any_bytes_are_read_or_refused(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    meta = bytearray(base64.b64decode(META_MAT))
    if seed % 2:  # behind the compression, where the parser is
        plain = bytearray(zlib.decompress(meta[136:]))
        for _ in range(rng.randrange(1, 5)):
            plain[rng.randrange(len(plain))] = rng.choice([0, 1, 127, 128, 255])
        packed = zlib.compress(plain)
        meta = meta[:128] + struct.pack("<II", 15, len(packed)) + packed
    else:
        meta[rng.randrange(len(meta))] = rng.randrange(256)
    file = kit_of(tmp_path / "kit.tar.gz", meta=bytes(meta))
    whole = bytearray(file.read_bytes())
    if seed % 3 == 0:
        whole[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        file.write_bytes(whole[: rng.choice([len(whole), len(whole) // 2])])
    try:
        labelled = label_by_file(listing(*VALIDATION), file)
    except UserError:
        return
    assert len(labelled.labels) == 3
