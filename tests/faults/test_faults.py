"""Whatever befalls a run, its losses and its samples end up those of the run that nothing befell."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train.openmp  # noqa: F401
from pipeline.dataset.dataset import BadSampleError, ShardSet
from pipeline.loader import loader as loader_module
from pipeline.loader.bad_samples import BAD_SAMPLES_FILE, BadSamples
from pipeline.sampling.order import choose_order
from tests.helpers import sabotage
from tests.helpers.damage import change_bytes, copy_dataset, put_image
from tests.helpers.encoded import bad_images
from tests.helpers.photos import image_bytes
from tests.helpers.sessions import KILL, ROOT, TERM, Sessions
from tests.helpers.toy_runs import CPU, TINY, call
from train import pretrain
from train.distributed.stop_signals import EXIT_PREEMPTED
from train.storage.checkpoints import newest_checkpoint
from train.storage.run_folder import read_lines

STEPS = 12  # 3 epochs of 4 steps of 12 of the 48 photos
RUN = ["--epochs", "3", "--global-batch", "12", "--checkpoint-every", "2steps", "--keep-checkpoints", "2"]
LOG = ["--log-every", "1", "--record-samples"]


def flags(data: Path, run_dir: Path, *more: str, backend: str = "torchvision") -> list[str]:
    return ["--data", str(data), "--run-dir", str(run_dir), *RUN, *LOG, *TINY, *CPU, "--backend", backend, *more]


def numbers(run_dir: Path, ranks: int = 1) -> tuple[dict[int, float], dict[int, float], list[list[list[int]]]]:
    """Losses by step, kNN by step, and the sample ids of each rank and step. Each step is there once."""
    lines = read_lines(run_dir / "metrics.jsonl")
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    knn = {line["step"]: line["knn_top1"] for line in lines if "knn_top1" in line}
    assert len(lines) == len(losses) + len(knn)
    samples = [read_lines(run_dir / f"samples-rank{rank}.jsonl") for rank in range(ranks)]
    assert all([line["step"] for line in part] == list(range(1, len(losses) + 1)) for part in samples)
    return losses, knn, [[line["ids"] for line in part] for part in samples]


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sessions]:
    made = Sessions(tmp_path_factory.mktemp("sessions"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def undisturbed(photo_dataset_path: Path, sessions: Sessions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert sessions.run(flags(photo_dataset_path, run_dir)) == 0, sessions.said()
    assert len(numbers(run_dir)[0]) == STEPS
    return run_dir


def survive(
    sessions: Sessions, arguments: list[str], strikes: list[tuple[str, int]], number: int, expected: int
) -> None:
    """Strike each session at its place, going on with --resume, then let one come to the end."""
    for place, occurrence in strikes:
        code = sessions.run([*arguments, "--resume"], place, occurrence, number)
        assert code in (expected, 0), sessions.said()  # 0: the run was over before it came to that place
    assert sessions.run([*arguments, "--resume"]) == 0, sessions.said()


@pytest.mark.parametrize("place", ["half a checkpoint written", "between forward and backward"])
def test_killed_once(
    place: str, undisturbed: Path, photo_dataset_path: Path, sessions: Sessions, tmp_path: Path
) -> None:
    arguments = flags(photo_dataset_path, tmp_path / "run")
    assert sessions.run(arguments, place, 3, KILL) == -KILL
    assert not (tmp_path / "run" / "summary.json").exists()
    assert sessions.run([*arguments, "--resume"]) == 0, sessions.said()
    assert numbers(tmp_path / "run") == numbers(undisturbed)
    assert not [path for path in (tmp_path / "run" / "checkpoints").iterdir() if ".tmp-" not in path.name][2:]


def test_stopped_once(undisturbed: Path, photo_dataset_path: Path, sessions: Sessions, tmp_path: Path) -> None:
    """SIGTERM while a checkpoint is written: it is finished, and so is the step."""
    arguments = flags(photo_dataset_path, tmp_path / "run")
    assert sessions.run(arguments, "half a checkpoint written", 2, TERM) == EXIT_PREEMPTED
    assert sessions.run([*arguments, "--resume"]) == 0
    assert numbers(tmp_path / "run") == numbers(undisturbed)


@pytest.mark.parametrize(("evaluation", "step"), [(1, 0), (2, 4), (4, STEPS)])
def test_stopped_in_knn(
    evaluation: int, step: int, undisturbed: Path, photo_dataset_path: Path, sessions: Sessions, tmp_path: Path
) -> None:
    """The untrained encoder's, that of an epoch, the last one: given up, with a checkpoint, and made again."""
    arguments = flags(photo_dataset_path, tmp_path / "run")
    assert sessions.run(arguments, "kNN evaluation", evaluation, TERM) == EXIT_PREEMPTED, sessions.said()
    assert step not in numbers(tmp_path / "run")[1]
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert newest.name.startswith(f"step-{step:09d}-")
    assert sessions.run([*arguments, "--resume"]) == 0, sessions.said()
    assert numbers(tmp_path / "run") == numbers(undisturbed)


def test_stopped_before_the_first_step(photo_dataset_path: Path, sessions: Sessions, tmp_path: Path) -> None:
    arguments = flags(photo_dataset_path, tmp_path / "run")
    assert sessions.run(arguments, "opening the run", 1, TERM) == EXIT_PREEMPTED
    assert "stopped by SIGTERM before the first step; start again with --resume" in sessions.said()
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert sessions.run([*arguments, "--resume", "--max-steps", "1"]) == 0, sessions.said()


@pytest.mark.faults
@pytest.mark.parametrize("place", sabotage.PLACES)
def test_killed_at_every_place(
    place: str, undisturbed: Path, photo_dataset_path: Path, sessions: Sessions, tmp_path: Path
) -> None:
    arguments = flags(photo_dataset_path, tmp_path / "run")
    assert sessions.run(arguments, place, 1, KILL) == -KILL, sessions.said()
    assert sessions.run([*arguments, "--resume"]) == 0, sessions.said()
    assert numbers(tmp_path / "run") == numbers(undisturbed)


@pytest.mark.faults
@pytest.mark.parametrize(("number", "expected", "times"), [(KILL, -KILL, 20), (TERM, EXIT_PREEMPTED, 5)])
@pytest.mark.parametrize("seed", range(2))
def test_struck_again_and_again(
    seed: int,
    number: int,
    expected: int,
    times: int,
    undisturbed: Path,
    photo_dataset_path: Path,
    sessions: Sessions,
    tmp_path: Path,
) -> None:
    """20 SIGKILLs, or 5 SIGTERMs, at random places of one run; a checkpoint's writing is always among them."""
    rng = random.Random(seed)
    places = list(sabotage.PLACES)
    strikes = [("half a checkpoint written", 1)]
    strikes += [(rng.choice(places), rng.randint(1, 2)) for _ in range(times - 1)]
    survive(sessions, flags(photo_dataset_path, tmp_path / "run"), strikes, number, expected)
    assert numbers(tmp_path / "run") == numbers(undisturbed)


# Bad samples. The rule, spelled out: the clean dataset in an order in which bad samples are replaced.


def rotten(path: Path, backend: str) -> tuple[Path, set[int]]:
    """More than fifteen kinds of bad image at once, with checksums that fit, and some with those that do not."""
    dataset = ShardSet.open(path)
    chosen = np.random.default_rng(4).permutation(48)[:20].tolist()
    kinds = {**bad_images(), **more_bad_images()}
    if backend == "dali":
        del kinds["a bomb's header"]  # DALI asks for its 10 GB before it finds that the pixels are missing
    assert len(kinds) >= 15
    bad = set()
    for sample, data in zip(chosen, kinds.values(), strict=False):
        room = int(dataset.samples[sample]["length"])
        put_image(path, sample, data[:room])
        bad.add(sample)
    change_bytes(path, chosen[len(kinds) :])
    return path, bad | set(chosen[len(kinds) :])


def more_bad_images() -> dict[str, bytes]:
    jpeg = image_bytes(1)
    return {
        "a JPEG's magic and zeros": jpeg[:4] + bytes(800),
        "HTML in place of an image": b"<html>404 Not Found</html>",
        "a GIF's magic": b"GIF89a" + bytes(100),
        "a PDF": b"%PDF-1.7\n" + bytes(100),
        "half a tar header": b"ustar" + bytes(300),
        "a bomb's header": b"P6\n60000 60000\n255\n",
        "one byte": b"\xff",
    }


def by_the_rule(bad: set[int]) -> Callable[..., Any]:
    replaced = np.arange(48)
    for sample in range(48):
        while replaced[sample] in bad:
            replaced[sample] = (replaced[sample] + 1) % 48

    def choose(*arguments: Any) -> Any:
        order = choose_order(*arguments)
        return lambda epoch, positions: replaced[order(epoch, positions)]

    return choose


@pytest.mark.parametrize("backend", ["torchvision", "dali"])
def test_bad_samples_change_what_the_rule_says_and_nothing_else(
    backend: str,
    photo_dataset_path: Path,
    sessions: Sessions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    one_thread: None,
) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    data, bad = rotten(copy_dataset(photo_dataset_path, tmp_path / "rotten"), backend)
    arguments = flags(data, tmp_path / "run", "--knn-every", "0", backend=backend)
    assert call(monkeypatch, pretrain, *arguments) == 0
    found = read_lines(tmp_path / "run" / BAD_SAMPLES_FILE, "sample")
    clean = ShardSet.open(photo_dataset_path)
    assert sorted(line["sample"] for line in found) == sorted(bad)
    for line in found:
        assert line["key"] == clean.key(line["sample"])
        assert line["shard"] == clean.shards[line["sample"] // 10].name
        assert line["replacement"] == (line["sample"] + 1) % 48
        assert line["reason"].startswith(("checksum differs", "cannot be decoded"))
    with monkeypatch.context() as patch:
        patch.setattr(loader_module, "choose_order", by_the_rule(bad))
        ruled = flags(photo_dataset_path, tmp_path / "ruled", "--knn-every", "0", backend=backend)
        assert call(patch, pretrain, *ruled) == 0
    assert numbers(tmp_path / "run")[0] == numbers(tmp_path / "ruled")[0]
    if backend == "torchvision":  # killed in the middle, the same; and the record does not grow
        again = flags(data, tmp_path / "killed", "--knn-every", "0")
        assert sessions.run(again, "after the step is written", 7, KILL) == -KILL
        with open(tmp_path / "killed" / BAD_SAMPLES_FILE, "ab") as file:
            file.write(b'{"sample": 4')  # as if the kill had come while a line was written
        assert sessions.run([*again, "--resume"]) == 0, sessions.said()
        assert numbers(tmp_path / "killed") == numbers(tmp_path / "run")
        assert by_sample(tmp_path / "killed") == by_sample(tmp_path / "run")


def test_without_checksums_only_what_cannot_be_decoded_is_found(
    photo_dataset_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    one_thread: None,
) -> None:
    data = copy_dataset(photo_dataset_path, tmp_path / "rotten")
    change_bytes(data, [3])  # it can still be decoded
    arguments = ["--max-steps", "4", "--knn-data", str(data)]
    assert call(monkeypatch, pretrain, *flags(data, tmp_path / "run", *arguments)) == 0
    assert [line["sample"] for line in read_lines(tmp_path / "run" / BAD_SAMPLES_FILE, "sample")] == [3]
    assert capsys.readouterr().out.count("left out of the accuracy: sample 3") == 4  # two evaluations of two datasets
    again = flags(data, tmp_path / "again", *arguments, "--no-verify-checksums")
    assert call(monkeypatch, pretrain, *again) == 0
    assert not (tmp_path / "again" / BAD_SAMPLES_FILE).exists()
    assert "bad sample" not in capsys.readouterr().out


def by_sample(run_dir: Path) -> list[dict[str, Any]]:
    return sorted(read_lines(run_dir / BAD_SAMPLES_FILE, "sample"), key=lambda line: line["sample"])


def test_too_many_bad_samples_stop_the_run_with_their_list(
    photo_dataset_path: Path, sessions: Sessions, tmp_path: Path
) -> None:
    """The count is the run's: what a former session found counts as well."""
    data = copy_dataset(photo_dataset_path, tmp_path / "rotten")
    change_bytes(data, [3, 14, 30])
    arguments = flags(data, tmp_path / "run", "--knn-every", "0", "--max-bad-samples", "2")
    assert sessions.run(arguments) == 2
    said = sessions.said()
    for sample in (3, 14, 30):
        assert f"sample {sample} (key {ShardSet.open(data).key(sample)} in shard-" in said
    assert "3 bad samples, more than the 2 allowed by --max-bad-samples" in said
    assert sessions.run([*arguments, "--resume"]) == 2
    allowing = [*arguments[:-1], "3", "--resume"]
    assert sessions.run(allowing) == 0, sessions.said()


def test_the_record_of_several_ranks_names_each_sample_once(tmp_path: Path) -> None:
    ranks = [BadSamples(48, 2, file=tmp_path / BAD_SAMPLES_FILE) for _ in range(3)]
    for rank in ranks:
        rank.add(BadSampleError(47, "shard-000004.tar", "k", "gone"))
        rank.add(BadSampleError(5, "shard-000000.tar", "j", "rotten"))
    lines = read_lines(tmp_path / BAD_SAMPLES_FILE, "sample")
    assert [(line["sample"], line["replacement"]) for line in lines] == [(47, 0), (5, 6)]
    with pytest.raises(Exception, match="3 bad samples, more than the 2 allowed"):
        ranks[1].add(BadSampleError(6, "shard-000000.tar", "l", "rotten"))


def edit_record(folder: Path, **changes: Any) -> None:
    info = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**info, **changes}))


# Files beside the images: a run refuses them at its start, with exit code 2, or does not depend on them.
REFUSED: dict[str, Callable[[Path, Path], Any]] = {
    "a truncated tar": lambda d, _: os.truncate(d / "shard-000001.tar", 5000),
    "a tar gone": lambda d, _: (d / "shard-000001.tar").unlink(),
    "stale samples.npy": lambda d, other: shutil.copy(other / "samples.npy", d / "samples.npy"),
    "shifted samples.npy": lambda d, _: np.save(d / "samples.npy", np.roll(np.load(d / "samples.npy"), 1)),
    "empty samples.npy": lambda d, _: (d / "samples.npy").write_bytes(b""),
    "garbage samples.npy": lambda d, _: (d / "samples.npy").write_bytes(os.urandom(5000)),
    "samples.npy with code": lambda d, _: np.save(d / "samples.npy", np.array([{}]), allow_pickle=True),
    "stale dataset.json": lambda d, other: shutil.copy(other / "dataset.json", d / "dataset.json"),
    "empty dataset.json": lambda d, _: (d / "dataset.json").write_bytes(b""),
    "garbage dataset.json": lambda d, _: (d / "dataset.json").write_bytes(b"\xff" * 99),
    "class names that are none": lambda d, _: edit_record(d, classes=[1, 2, 3, 4]),
    "too few class names": lambda d, _: edit_record(d, classes=["cat", "dog"]),
}
HARMLESS: dict[str, Callable[[Path, Path], Any]] = {
    "stale .idx": lambda d, _: shutil.copy(d / "shard-000001.idx", d / "shard-000002.idx"),
    "empty .idx": lambda d, _: (d / "shard-000002.idx").write_bytes(b""),
    "garbage .idx": lambda d, _: (d / "shard-000002.idx").write_bytes(os.urandom(99)),
    "no .idx": lambda d, _: (d / "shard-000002.idx").unlink(),
}


@pytest.fixture(scope="module")
def other_dataset(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images sharded with another seed: every file fits in form, and none in content."""
    from pipeline.sharding.make_dataset import make_dataset
    from pipeline.sharding.options import ShardingOptions

    out = tmp_path_factory.mktemp("other") / "photos"
    make_dataset(str(photo_folder), out, ShardingOptions(samples_per_shard=10, seed=1), quiet=True, in_process=True)
    return out


@pytest.mark.parametrize("kind", REFUSED)
def test_files_that_are_not_the_datasets_are_refused_before_the_first_step(
    kind: str, photo_dataset_path: Path, other_dataset: Path, sessions: Sessions, tmp_path: Path
) -> None:
    data = copy_dataset(photo_dataset_path, tmp_path / "data")
    REFUSED[kind](data, other_dataset)
    assert sessions.run(flags(data, tmp_path / "run")) == 2, sessions.said()
    assert not (tmp_path / "run").exists()


def test_dalis_index_plays_no_part_in_training(
    undisturbed: Path, photo_dataset_path: Path, other_dataset: Path, sessions: Sessions, tmp_path: Path
) -> None:
    for number, (kind, damage) in enumerate(HARMLESS.items()):
        data = copy_dataset(photo_dataset_path, tmp_path / str(number))
        damage(data, other_dataset)
        run_dir = tmp_path / f"run{number}"
        assert sessions.run(flags(data, run_dir, "--max-steps", "2", "--knn-every", "0")) == 0, kind
        assert numbers(run_dir)[0] == {step: numbers(undisturbed)[0][step] for step in (1, 2)}, kind


@pytest.mark.parametrize(
    "damage",
    ["tar cut while training", "tar gone while training", "tar of another dataset"],
)
def test_a_tar_that_changes_after_the_start(
    damage: str, photo_dataset_path: Path, other_dataset: Path, sessions: Sessions, tmp_path: Path
) -> None:
    """Every sample of it is replaced and named, or the run ends with their list: never a wrong image."""
    data = copy_dataset(photo_dataset_path, tmp_path / "data")
    tar = data / "shard-000001.tar"
    match damage:
        case "tar of another dataset":  # of the same length, so that it opens
            size = tar.stat().st_size
            content = (other_dataset / tar.name).read_bytes()
            tar.write_bytes(content[:size].ljust(size, b"\0"))
        case "tar cut while training":
            edit_shard(data, 1, cut=5000)
        case "tar gone while training":
            edit_shard(data, 1, cut=0)
    arguments = flags(data, tmp_path / "run", "--knn-every", "0")
    assert sessions.run(arguments) == 0, sessions.said()
    found = {line["sample"] for line in read_lines(tmp_path / "run" / BAD_SAMPLES_FILE, "sample")}
    assert found <= set(range(10, 20))
    assert len(found) >= 5
    assert sessions.run([*arguments, "--resume"]) == 0


def edit_shard(data: Path, number: int, cut: int) -> None:
    """A shard whose record agrees with it being cut, as it would look to a run that opened it before."""
    tar = data / f"shard-{number:06d}.tar"
    size = tar.stat().st_size
    os.truncate(tar, cut)
    os.truncate(tar, size)  # zeros from there on: bytes that were there at the start are not there any more


# Ranks and torchrun.

STRUCK_RANK = """
import os, sys
sys.path[:0] = {paths!r}
import train.openmp
from tests.helpers import sabotage
from pipeline.common.errors import exit_on_user_error
from train import pretrain
if os.environ["RANK"] == {rank!r} and not os.path.exists({marker!r}):
    open({marker!r}, "w").close()
    sabotage.arm({place!r}, {time}, {number})
exit_on_user_error(pretrain.main)
"""


def torchrun(processes: int, script: str, arguments: list[str], *options: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launcher, *options, script, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("rank", "number", "place", "time"),
    [
        ("1", KILL, "between forward and backward", 5),
        ("0", KILL, "between forward and backward", 5),
        ("1", TERM, "between forward and backward", 5),
        ("1", TERM, "kNN evaluation", 2),
        ("0", KILL, "half a checkpoint written", 2),
    ],
)
def test_torchrun_restarts_and_the_run_goes_on(
    rank: str, number: int, place: str, time: int, photo_dataset_path: Path, tmp_path: Path
) -> None:
    """One of two ranks is struck; torchrun ends the other, starts both again, and --resume finds the checkpoint."""
    calm = flags(photo_dataset_path, tmp_path / "calm", "--resume")
    assert torchrun(2, "train/pretrain.py", calm).returncode == 0
    script = tmp_path / "struck.py"
    paths = [str(ROOT), str(ROOT / "tests")]
    marker = str(tmp_path / "struck-already")
    strike = {"place": place, "time": time, "number": int(number)}
    script.write_text(STRUCK_RANK.format(paths=paths, rank=rank, marker=marker, **strike))
    struck = flags(photo_dataset_path, tmp_path / "struck", "--resume")
    ended = torchrun(2, str(script), struck, "--max-restarts=2")
    assert ended.returncode == 0, ended.stderr
    assert Path(marker).exists()
    assert "going on after step" in ended.stdout
    assert numbers(tmp_path / "struck", 2) == numbers(tmp_path / "calm", 2)


@pytest.mark.faults
def test_resumed_on_one_two_and_four_ranks(
    undisturbed: Path, photo_dataset_path: Path, sessions: Sessions, tmp_path: Path
) -> None:
    """Global batches and losses are those of one process throughout."""
    arguments = flags(photo_dataset_path, tmp_path / "run", "--resume")
    assert sessions.run([*arguments, "--max-steps", "3"]) == 0
    assert torchrun(2, "train/pretrain.py", [*arguments, "--max-steps", "7"]).returncode == 0
    assert torchrun(4, "train/pretrain.py", [*arguments, "--max-steps", "9"]).returncode == 0
    assert sessions.run(arguments) == 0, sessions.said()
    steps = [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, STEPS + 1))
    parts: dict[int, list[int]] = {}
    for rank in range(4):
        for line in read_lines(tmp_path / "run" / f"samples-rank{rank}.jsonl"):
            parts.setdefault(line["step"], []).extend(line["ids"])
    assert [parts[step] for step in range(1, STEPS + 1)] == numbers(undisturbed)[2][0]
    made, expected = (
        [line["loss"] for line in read_lines(folder / "metrics.jsonl") if "loss" in line]
        for folder in (tmp_path / "run", undisturbed)
    )
    assert made == pytest.approx(expected, abs=1e-4)


SLURM = {  # stand-ins for Slurm's commands
    "srun": '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n',
    "scontrol": '#!/bin/bash\nif [ $1 = show ]; then echo localhost; else echo "$@" > {marker}; fi\n',
}


@pytest.mark.faults
def test_the_slurm_script_saves_and_goes_back_into_the_queue(photo_dataset_path: Path, tmp_path: Path) -> None:
    """USR1 to the batch script: torchrun's two processes save the step they are in, and nothing of it is lost."""
    for name, content in SLURM.items():
        (tmp_path / name).write_text(content.format(marker=tmp_path / "requeued"))
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PROCESSES_PER_NODE": "2", "SLURM_SUBMIT_DIR": str(ROOT)}
    environment |= {"SLURM_NNODES": "1", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost"}
    environment["PATH"] = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    run_dir = tmp_path / "run"
    arguments = flags(photo_dataset_path, run_dir, "--knn-every", "0", "--epochs", "100000")
    with open(tmp_path / "log", "wb") as log:
        job = subprocess.Popen(
            ["bash", "scripts/slurm_pretrain.sbatch", *arguments], cwd=ROOT, env=environment, stdout=log, stderr=log
        )
        while len(read_lines(run_dir / "metrics.jsonl")) < 5 and job.poll() is None:
            time.sleep(0.2)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=120) == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    done = read_lines(run_dir / "metrics.jsonl")[-1]["step"]
    assert max(path.name for path in (run_dir / "checkpoints").iterdir()).startswith(f"step-{done:09d}-")
