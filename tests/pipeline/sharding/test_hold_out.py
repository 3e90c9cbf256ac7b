"""--hold-out: a share of each class, the same for the same seed, near-duplicates on one side, nothing lost."""

from __future__ import annotations

import io
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pipeline.sharding.make_dataset
from pipeline.common.errors import UserError
from pipeline.dataset.dataset import ShardSet
from pipeline.sharding.hold_out import Thumbnails, held_out, near_duplicates
from pipeline.sharding.make_dataset import Summary, make_dataset
from pipeline.sharding.options import ShardingOptions
from pipeline.sources.image_file import gray_thumbnail
from tests.helpers.photos import image_bytes, write_photo_folder
from tests.helpers.toy_runs import call
from tools import make_shards

PER_CLASS = 20


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of 20 photos; each has a twin that was saved again, made smaller, brighter, or copied."""
    root = write_photo_folder(tmp_path_factory.mktemp("hold-out") / "photos", per_class=PER_CLASS // 2)
    for number, path in enumerate(sorted(root.rglob("*.*"))):
        image, twin = Image.open(path), path.with_name(f"twin of {path.stem}.jpg")
        match number % 4:
            case 0:
                image.save(twin, quality=60)
            case 1:
                image.resize((image.width * 2, image.height * 2)).save(twin, quality=90)
            case 2:
                image.point(lambda value: min(value + 10, 255)).save(twin, quality=90)
            case _:
                shutil.copy(path, twin)
    return root


def split(source: Path, out: Path, **options: object) -> Summary:
    chosen = ShardingOptions(**{"samples_per_shard": 16, "hold_out": 0.2, **options})  # type: ignore[arg-type]
    return make_dataset(str(source), out, chosen, quiet=True, in_process=True)


def names(folder: Path) -> set[str]:
    data = ShardSet.open(folder)
    return {data.names[i] for i in range(len(data))}


def test_each_class_is_on_both_sides_and_twins_are_on_one(photos: Path, tmp_path: Path) -> None:
    summary = split(photos, tmp_path / "d")
    assert summary.held_out is not None
    train, val = names(tmp_path / "d"), names(tmp_path / "d-val")
    assert not train & val
    assert len(train | val) == 4 * PER_CLASS == summary.images + summary.held_out.images
    for side, size in ((train, 16), (val, 4)):
        assert Counter(name.split("/")[0] for name in side) == dict.fromkeys(("cat", "dog", "fish", "newt"), size)
        originals = {Path(name).stem for name in side if "twin of" not in name}
        assert {Path(name).stem.removeprefix("twin of ") for name in side if "twin of" in name} == originals
    whole, held = ShardSet.open(tmp_path / "d"), ShardSet.open(tmp_path / "d-val")
    assert whole.classes == held.classes
    assert (whole.split, held.split) == ("train", "val")


def test_the_same_seed_gives_the_same_bytes_and_another_one_another_choice(photos: Path, tmp_path: Path) -> None:
    for out in ("one", "two"):
        split(photos, tmp_path / out / "d")
    assert names(tmp_path / "one" / "d-val") == names(tmp_path / "two" / "d-val")
    for name in ("shard-000000.tar", "samples.npy"):
        same = [(tmp_path / out / "d-val" / name).read_bytes() for out in ("one", "two")]
        assert same[0] == same[1]
    split(photos, tmp_path / "three" / "d", seed=1)
    assert names(tmp_path / "three" / "d-val") != names(tmp_path / "one" / "d-val")


def test_the_same_through_worker_processes_after_a_stop_between_the_two(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split(photos, tmp_path / "one" / "d")
    work, calls = pipeline.sharding.make_dataset.build_missing, []

    def stop_at_the_second(*arguments: object, **more: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        work(*arguments, **more)  # type: ignore[arg-type]

    options = ShardingOptions(samples_per_shard=16, hold_out=0.2, workers=2)
    with monkeypatch.context() as patched:
        patched.setattr(pipeline.sharding.make_dataset, "build_missing", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            make_dataset(str(photos), tmp_path / "two" / "d", options, quiet=True)
    summary = make_dataset(str(photos), tmp_path / "two" / "d", options, quiet=True)
    assert summary.already_there
    for folder in ("d", "d-val"):
        same = [(tmp_path / out / folder / "shard-000000.tar").read_bytes() for out in ("one", "two")]
        assert same[0] == same[1]
        assert not (tmp_path / "two" / folder / ".partial").exists()


def test_a_lost_shard_of_the_held_out_set_is_written_again(photos: Path, tmp_path: Path) -> None:
    split(photos, tmp_path / "d")
    lost = tmp_path / "d-val" / "shard-000000.tar"
    recorded = lost.read_bytes()
    lost.unlink()
    again = split(photos, tmp_path / "d")
    assert again.held_out is not None
    assert again.held_out.restored == 1
    assert lost.read_bytes() == recorded


def test_overwrite_replaces_both(photos: Path, tmp_path: Path) -> None:
    split(photos, tmp_path / "d")
    split(photos, tmp_path / "d", overwrite=True, hold_out=0.5)
    assert len(names(tmp_path / "d-val")) == 2 * PER_CLASS


def test_without_labels_and_with_unreadable_images_the_share_is_of_all(tmp_path: Path) -> None:
    source = tmp_path / "flat"
    source.mkdir()
    for number in range(40):
        data = image_bytes(number)
        (source / f"{number:02d}.jpg").write_bytes(data[: len(data) // 2] if number % 10 == 0 else data)
    summary = split(source, tmp_path / "d", hold_out=0.25)
    assert summary.held_out is not None
    assert summary.images + summary.held_out.images == 36
    assert sum(summary.rejected.values()) + sum(summary.held_out.rejected.values()) == 4
    assert 6 <= summary.held_out.images <= 10


def test_sixteen_bits_and_gray_have_thumbnails_of_their_own_range() -> None:
    values = (np.arange(64 * 80).reshape(64, 80) % 3000).astype(np.uint16)
    out = io.BytesIO()
    Image.fromarray(values).save(out, "PNG")
    deep = gray_thumbnail(out.getvalue(), 9, 8, 1 << 20)
    assert deep.shape == (8, 9)
    assert int(deep.max()) - int(deep.min()) > 50


def test_look_alikes_by_the_thousand_are_one_group_and_different_images_are_not() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, 72, dtype=np.uint8)
    same = np.clip(base + rng.integers(-1, 2, (3000, 72)), 0, 255).astype(np.uint8)
    others = rng.integers(0, 256, (3000, 72), dtype=np.uint8)
    groups = near_duplicates(Thumbnails(np.concatenate((same, others)), np.ones(6000, bool)))
    assert np.unique(groups[:3000]).size < 30  # those whose hash changed by more than 5 bits stay outside
    assert np.unique(groups[3000:]).size == 3000


def test_a_class_of_one_image_stays_for_training_and_twins_of_everything_are_refused() -> None:
    rng = np.random.default_rng(1)
    thumbs = Thumbnails(rng.integers(0, 256, (21, 72), dtype=np.uint8), np.ones(21, bool))
    held = held_out(thumbs, np.array([0] * 20 + [1]), 0.1, seed=0)
    assert held.sum() == 2
    assert not held[20]
    alike = Thumbnails(np.full((9, 72), 7, np.uint8), np.ones(9, bool))
    with pytest.raises(UserError, match=r"--hold-out 0.5 leaves one side of 9 images empty"):
        held_out(alike, np.zeros(9, int), 0.5, seed=0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hold-out", "0"], "--hold-out 0.0: a share lies between 0 and 1"),
        (["--hold-out", "1.5"], "--hold-out 1.5: a share lies between 0 and 1"),
        (["--hold-out", "nan"], "--hold-out nan: a share lies between 0 and 1"),
        (["--hold-out", "0.1", "--part", "0/2"], "--part does not go with --hold-out"),
    ],
)
def test_mistakes(
    flags: list[str],
    message: str,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(monkeypatch, make_shards, photos, tmp_path / "d", *flags) == 2
    assert message in capsys.readouterr().err


def test_tars_that_are_only_indexed_cannot_be_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, make_shards, f"wds:{tmp_path}/x.tar", tmp_path / "d", "--hold-out", "0.1") == 2
    assert "--hold-out does not go with wds:" in capsys.readouterr().err
