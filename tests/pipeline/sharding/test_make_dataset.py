"""The same bytes from the same input, whatever happens on the way; nothing half-written is taken for a dataset."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import pipeline.common.files
import pipeline.sources.readers
from pipeline.common.errors import UserError
from pipeline.common.locks import exclusive_lock
from pipeline.dataset.dataset import ShardSet
from pipeline.sharding.make_dataset import Summary, make_dataset
from pipeline.sharding.options import ShardingOptions
from pipeline.sharding.workers import build_missing
from pipeline.sharding.write_shard import Job, Tick, sample_key
from pipeline.sources.listing import Listing
from tests.helpers.photos import CLASSES, image_bytes

PER_SHARD = 10  # photo_folder then makes 5 shards


def make(source: Path | str, out: Path, **options: object) -> Summary:
    chosen = ShardingOptions(**{"samples_per_shard": PER_SHARD, **options})  # type: ignore[arg-type]
    return make_dataset(str(source), out, chosen, quiet=True, in_process=not chosen.workers)


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


CHILD = """
import os, signal, sys
from pipeline.sharding.workers import keep_torch_out
keep_torch_out()
import pipeline.sharding.finalize, pipeline.sharding.write_shard, pipeline.sharding.workers
from pipeline.common.errors import UserError
from pipeline.sharding.options import ShardingOptions
from pipeline.sharding.make_dataset import make_dataset

def kill_at_call(owner, name, call, number):
    original, calls = getattr(owner, name), [0]
    def wrapped(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)
    setattr(owner, name, wrapped)

if __name__ == "__main__":
    source, out, workers, sabotage = sys.argv[1:5]
    exec(sabotage)
    try:
        options = ShardingOptions(samples_per_shard=10, workers=int(workers))
        make_dataset(source, out, options, quiet=True, in_process=workers == "0")
    except UserError as error:
        sys.exit(f"error: {error}")
"""


def run_child(tmp_path: Path, source: Path, out: Path, workers: int, sabotage: str) -> subprocess.CompletedProcess[str]:
    """Runs to the end of all its processes, since each of them holds the pipes open."""
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    command = [sys.executable, str(script), str(source), str(out), str(workers), sabotage]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_number_of_workers_makes_no_difference(
    workers: int, photo_folder: Path, photo_dataset_path: Path, tmp_path: Path
) -> None:
    summary = make(photo_folder, tmp_path / "out", workers=workers)
    assert (summary.shards, summary.images, summary.missing, summary.classes) == (5, 48, 0, 4)
    assert tree(tmp_path / "out") == tree(photo_dataset_path)


def test_workers_start_without_torch() -> None:
    code = (
        "import sys, pipeline.sharding.make_dataset; assert not {'torch', 'webdataset', 'numba'} & set(sys.modules);"
        "from pipeline.sharding.workers import keep_torch_out; keep_torch_out();"
        "from webdataset import TarWriter; assert sys.modules['torch'] is None"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_tar_gives_the_shards_of_its_folder(photo_folder: Path, photo_dataset_path: Path, tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "photos"), "gztar", photo_folder)
    make(archive, tmp_path / "out")
    ours, theirs = tree(tmp_path / "out"), tree(photo_dataset_path)
    assert set(ours) == set(theirs)
    assert {name for name in ours if ours[name] != theirs[name]} == {"dataset.json"}  # it names the source


def test_seeds_shuffle_over_all_shards(photo_folder: Path, photo_dataset: ShardSet, tmp_path: Path) -> None:
    make(photo_folder, tmp_path / "out", seed=1)
    other = ShardSet.open(tmp_path / "out")
    assert other.fingerprint != photo_dataset.fingerprint
    for dataset in (other, photo_dataset):
        keys = [dataset.key(i) for i in range(len(dataset))]
        assert keys != sorted(keys)
        firsts = {int(label) for label in dataset.labels(range(PER_SHARD))}
        assert len(firsts) > 1  # a shard is no class
    assert sorted(other.key(i) for i in range(48)) == sorted(photo_dataset.key(i) for i in range(48))


KILLS = {
    "listing": "kill_at_call(os, 'fsync', 2, signal.SIGKILL)",
    "order there, job not": "kill_at_call(os, 'fsync', 14, signal.SIGKILL)",
    "inside the third shard": "kill_at_call(pipeline.sharding.write_shard, 'read_image', 25, signal.SIGKILL)",
    "tar there, index not": "kill_at_call(pipeline.sharding.write_shard, 'write_index', 2, signal.SIGKILL)",
    "index there, marker not": "kill_at_call(pipeline.sharding.write_shard, 'write_json', 3, signal.SIGKILL)",
    "all shards there, no samples.npy": "kill_at_call(pipeline.sharding.finalize, '_write_samples', 1, signal.SIGKILL)",
    "samples.npy there, dataset.json not": "kill_at_call(pipeline.sharding.finalize, 'write_json', 1, signal.SIGKILL)",
    "dataset.json there, .partial too": "kill_at_call(pipeline.dataset.out_folder.shutil, 'rmtree', 1, signal.SIGKILL)",
}


@pytest.mark.parametrize("moment", KILLS)
def test_killed_and_started_again_it_ends_alike(
    moment: str, photo_folder: Path, photo_dataset_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run_child(tmp_path, photo_folder, out, 0, KILLS[moment]).returncode == -signal.SIGKILL
    if moment != "dataset.json there, .partial too":
        with pytest.raises(UserError, match="half-written"):
            ShardSet.open(out)
    make(photo_folder, out)
    assert tree(out) == tree(photo_dataset_path)


def test_killed_with_workers_running(photo_folder: Path, photo_dataset_path: Path, tmp_path: Path) -> None:
    kill = "kill_at_call(pipeline.sharding.workers._Meter, 'add', 2, signal.SIGKILL)"
    assert run_child(tmp_path, photo_folder, tmp_path / "out", 2, kill).returncode == -signal.SIGKILL
    make(photo_folder, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(photo_dataset_path)


def test_shards_that_are_there_are_not_built_again(
    photo_folder: Path, photo_dataset_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run_child(tmp_path, photo_folder, out, 0, KILLS["inside the third shard"])
    built = {name: (out / name).stat().st_mtime_ns for name in ("shard-000000.tar", "shard-000001.tar")}
    make(photo_folder, out, workers=2)
    assert built == {name: (out / name).stat().st_mtime_ns for name in built}
    assert tree(out) == tree(photo_dataset_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_ends_cleanly_and_goes_on(
    workers: int, photo_folder: Path, photo_dataset_path: Path, tmp_path: Path
) -> None:
    stop = "kill_at_call(pipeline.sharding.workers._Meter, 'add', 2, signal.SIGINT)"
    ended = run_child(tmp_path, photo_folder, tmp_path / "out", workers, stop)
    assert "KeyboardInterrupt" in ended.stderr
    assert ended.stderr.count("Traceback") == 1  # none from a worker
    assert not list((tmp_path / "out").rglob("*.tmp-*"))
    make(photo_folder, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(photo_dataset_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_may_not_grow_is_a_users_error(
    workers: int, photo_folder: Path, photo_dataset_path: Path, tmp_path: Path
) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, 15_000))"
    ended = run_child(tmp_path, photo_folder, tmp_path / "out", workers, limit)
    assert ended.returncode == 1
    assert "a file grew over the limit" in ended.stderr
    assert "Traceback" not in ended.stderr
    with pytest.raises(UserError, match="half-written"):
        ShardSet.open(tmp_path / "out")
    make(photo_folder, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(photo_dataset_path)


@pytest.mark.parametrize("after", [0, 3, 9, 14, 30])
def test_a_full_disk(
    after: int, photo_folder: Path, photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = [0], os.fsync

    def full(handle: int) -> None:
        calls[0] += 1
        if calls[0] > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(pipeline.common.files.os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device.*free some space"):
        make(photo_folder, tmp_path / "out")
    monkeypatch.setattr(pipeline.common.files.os, "fsync", real)
    with pytest.raises(UserError, match="half-written"):
        ShardSet.open(tmp_path / "out")
    make(photo_folder, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(photo_dataset_path)


def test_too_little_room_is_said_before_the_work(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=50_000)
    monkeypatch.setattr(pipeline.sources.readers.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="writing the shards needs at least"):
        make(photo_folder, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))


@dataclass
class DeadlyJob(Job):
    """Kills the worker that builds its shard, as the system does when memory runs out."""

    out: Path

    def __len__(self) -> int:
        return 4

    def images(self, numbers: list[int]) -> int:
        return len(numbers)

    def build(self, number: int, tick: Tick) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fewer --workers"):
        build_missing(DeadlyJob(tmp_path), ShardingOptions(workers=2), quiet=True)


def bad_folder(root: Path) -> Path:
    (root / "a").mkdir(parents=True)
    (root / "b").mkdir()
    good = image_bytes(1)
    for i in range(6):
        (root / "a" / f"good {i}.jpg").write_bytes(image_bytes(i))
    (root / "b" / "cut.jpg").write_bytes(good[: len(good) // 2])
    (root / "b" / "empty.jpg").write_bytes(b"")
    (root / "b" / "text.jpg").write_bytes(b"not found")
    (root / "b" / "anim.gif.jpg").write_bytes(image_bytes(2, encoding="GIF"))
    (root / "b" / "fine.png").write_bytes(image_bytes(3, encoding="PNG"))
    (root / "b" / "really a png.jpg").write_bytes(image_bytes(4, encoding="PNG"))
    (root / "b" / "huge.ppm").write_bytes(b"P5\n20000 20000\n255\n")
    (root / "b" / "notes.txt").write_text("")
    return root


def test_refused_images_are_recorded_and_left_out(tmp_path: Path) -> None:
    summary = make(bad_folder(tmp_path / "in"), tmp_path / "out", samples_per_shard=4, workers=2)
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert rejected == [
        {"name": "b/anim.gif.jpg", "reason": "GIF is not a supported format"},
        {"name": "b/cut.jpg", "reason": "truncated"},
        {"name": "b/empty.jpg", "reason": "empty file"},
        {"name": "b/huge.ppm", "reason": "larger than --max-pixels 100000000"},
        {"name": "b/notes.txt", "reason": "not an image file"},
        {"name": "b/text.jpg", "reason": "not an image: unknown or damaged format"},
    ]
    assert sum(summary.rejected.values()) == 6
    dataset = ShardSet.open(tmp_path / "out")
    assert sorted(dataset.labels(range(8)).tolist()) == [0] * 6 + [1] * 2
    shards = [dataset.shards[s].name for s in dataset.samples["shard"]]
    assert [s.name for s in dataset.shards] == sorted(set(shards))
    make(tmp_path / "in", tmp_path / "again", samples_per_shard=4)
    assert tree(tmp_path / "again") == tree(tmp_path / "out")


def test_verify_header_keeps_truncated_images(tmp_path: Path) -> None:
    summary = make(bad_folder(tmp_path / "in"), tmp_path / "out", verify="header")
    assert (summary.images, "truncated" in summary.rejected) == (9, False)


def test_a_shard_without_any_good_image_is_left_out(tmp_path: Path) -> None:
    make(bad_folder(tmp_path / "in"), tmp_path / "out", samples_per_shard=1)
    dataset = ShardSet.open(tmp_path / "out")
    assert (len(dataset.shards), dataset.samples["shard"].tolist()) == (8, list(range(8)))
    assert len(list((tmp_path / "out").glob("*.tar"))) == len(list((tmp_path / "out").glob("*.idx"))) == 8


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the 1 images can be used.*empty file"):
        make(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_limit_takes_a_part_of_the_shuffle(photo_folder: Path, photo_dataset: ShardSet, tmp_path: Path) -> None:
    make(photo_folder, tmp_path / "out", limit=13)
    some = ShardSet.open(tmp_path / "out")
    assert [some.key(i) for i in range(13)] == [photo_dataset.key(i) for i in range(13)]
    assert len(some) == 13


def test_shorter_side_reencodes_only_larger_images(photo_folder: Path, tmp_path: Path) -> None:
    make(photo_folder, tmp_path / "out", shorter_side=60)
    dataset = ShardSet.open(tmp_path / "out")
    sizes = dataset.sizes(range(48))
    assert sizes.min(axis=1).max() == 60
    names = sorted(p.relative_to(photo_folder).as_posix() for p in photo_folder.rglob("*.*"))
    for i in range(48):
        original = (photo_folder / names[int(dataset.key(i)[:9])]).read_bytes()
        assert (dataset.read(i) == original) == (sizes[i].min() < 60)


def test_parts_on_several_machines_make_one_dataset(
    photo_folder: Path, photo_dataset_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = make(photo_folder, out, part="1/2")
    assert (first.shards, first.missing) == (2, 3)
    with pytest.raises(UserError, match="half-written"):
        ShardSet.open(out)
    last = make(photo_folder, out, part="0/2")
    assert (last.shards, last.missing) == (5, 0)
    assert tree(out) == tree(photo_dataset_path)
    assert make(photo_folder, out, part="0/2").already_there


def test_a_call_without_part_completes_what_parts_left(
    photo_folder: Path, photo_dataset_path: Path, tmp_path: Path
) -> None:
    make(photo_folder, tmp_path / "out", part="2/3")
    make(photo_folder, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(photo_dataset_path)


def test_a_complete_dataset_is_left_alone(photo_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(photo_folder, out)
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    assert make(photo_folder, out, workers=2).already_there
    with pytest.raises(UserError, match=r"--seed was 0, now 5.*--overwrite"):
        make(photo_folder, out, seed=5)
    with pytest.raises(UserError, match="SOURCE was photos, now synthetic:10"):
        make("synthetic:10", out)
    assert before == {p: p.stat().st_mtime_ns for p in out.iterdir()}
    (out / "mine.txt").write_text("keep")
    make(photo_folder, out, seed=5, samples_per_shard=30, overwrite=True)
    assert sorted(p.name for p in out.glob("*.tar")) == ["shard-000000.tar", "shard-000001.tar"]
    assert (ShardSet.open(out).seed, (out / "mine.txt").read_text()) == (5, "keep")


def test_an_interrupted_run_goes_on_only_with_its_options_and_source(photo_folder: Path, tmp_path: Path) -> None:
    source, out = Path(shutil.copytree(photo_folder, tmp_path / "photos")), tmp_path / "out"
    make(source, out, part="0/2")
    with pytest.raises(UserError, match=r"interrupted run with other options \(--verify was full, now none\)"):
        make(source, out, verify="none")
    (source / CLASSES[0] / "new.jpg").write_bytes(image_bytes(5))
    with pytest.raises(UserError, match="has changed since the interrupted run"):
        make(source, out)
    make(source, out, overwrite=True)
    assert len(ShardSet.open(out)) == 49


def test_an_image_that_changes_while_it_is_read_stops_the_run(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(photo_folder, tmp_path / "photos"))
    monkeypatch.setattr(Listing, "fingerprint", lambda _: "as if the change came after the comparison")
    make(source, tmp_path / "out", part="0/2")
    for path in source.rglob("*.*"):
        path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(UserError, match="it changes while it is read"):
        make(source, tmp_path / "out")


def test_places_that_are_refused(photo_folder: Path, photo_dataset_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        make(photo_folder, tmp_path / "file")
    with pytest.raises(UserError, match="lies inside SOURCE"):
        make(photo_folder, photo_folder / "cat" / "shards")
    strange = Path(shutil.copytree(photo_dataset_path, tmp_path / "strange"))
    (strange / "dataset.json").unlink()
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"has shards but no dataset.json"):
            make(photo_folder, strange, overwrite=overwrite)
    assert len(list(strange.glob("*.tar"))) == 5
    with pytest.raises(UserError, match="does not exist"):
        make(tmp_path / "nowhere", tmp_path / "fresh")
    assert not (tmp_path / "fresh").exists()


def test_two_runs_into_one_folder(photo_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / ".partial").mkdir(parents=True)
    with (
        exclusive_lock(tmp_path / "out" / ".partial" / "lock", shared=False),
        pytest.raises(
            UserError, match=rf"\S+ \(process {os.getpid()} on \S+, since \S+ \S+\) is writing to \S+out: wait for it"
        ),
    ):
        make(photo_folder, tmp_path / "out")


def test_nothing_is_deleted_while_another_writes(photo_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(photo_folder, out)
    before = tree(out)
    (out / ".partial").mkdir()
    for options in ({"overwrite": True}, {}):
        if not options:
            (out / "dataset.json").unlink()
            del before["dataset.json"]
        with (
            exclusive_lock(out / ".partial" / "lock", shared=False),
            pytest.raises(UserError, match=r"is writing to \S+out: wait for it"),
        ):
            make(photo_folder, out, **options)
        assert {name: data for name, data in tree(out).items() if "partial" not in name} == before


@pytest.mark.parametrize("deleted", [1, 4, 12])
def test_an_overwrite_that_was_killed_leaves_nothing_behind(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deleted: int
) -> None:
    make(photo_folder, tmp_path / "out", samples_per_shard=10)
    left, unlink = [deleted], Path.unlink

    def strike(path: Path, *arguments: object, **more: object) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        unlink(path, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "unlink", strike)
    with pytest.raises(KeyboardInterrupt):
        make(photo_folder, tmp_path / "out", samples_per_shard=20, overwrite=True)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"interrupted run with other options|has changed since"):
        make(photo_folder, tmp_path / "out", samples_per_shard=20)
    make(photo_folder, tmp_path / "out", samples_per_shard=20, overwrite=True)
    make(photo_folder, tmp_path / "fresh", samples_per_shard=20)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


@pytest.mark.parametrize(
    "wrong",
    [
        {"samples_per_shard": 0},
        {"workers": -1},
        {"seed": -1},
        {"limit": 0},
        {"jpeg_quality": 101},
        {"part": "2/2"},
        {"part": "x"},
        {"part": "0/2", "overwrite": True},
        {"labels": "no/such/file"},
        {"classes_from": Path("no/such/dataset")},
    ],
)
def test_options_that_make_no_sense(wrong: dict[str, object], photo_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        make(photo_folder, tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_keys_are_plain_and_unique() -> None:
    assert sample_key(7, "cat/a.b c/日本 x.tar.jpg") == "000000007__x_tar"
    assert len(sample_key(1, "n" * 500 + ".jpg")) == 70
