"""Names of a run's files; reads metrics.jsonl."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError
from pipeline.common.files import (
    atomic_file,
    disk_errors,
    own_file,
    read_json,
    read_object,
    read_regular,
    strict_json,
)
from pipeline.common.locks import FolderLock, exclusive_lock

METRICS_FILE = "metrics.jsonl"
LOCK_FILE = "run.lock"


def claim_run_dir(run_dir: Path, held: ExitStack) -> FolderLock:
    """Make the run folder, and lock it for as long as ``held`` is open.

    Raises UserError if it cannot be made, or if another process writes to it, which is named.
    """
    with disk_errors(f"writing {run_dir}", f"--run-dir {run_dir} cannot be made", "name another folder"):
        run_dir.mkdir(parents=True, exist_ok=True)
        return held.enter_context(exclusive_lock(run_dir / LOCK_FILE, shared=False, folder=run_dir))


def cut_off(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines after ``step``, and a torn last line, from a file of JSON lines; returns those that stay."""
    lines = read_lines(path)
    kept = [line for line in lines if line["step"] <= step]
    if path.exists():
        if len(lines) < read_regular(path).count(b"\n"):
            shutil.copy(path, path.with_name(path.name + ".damaged"))
        with atomic_file(path) as file:
            file.write("".join(map(json_line, kept)).encode())
    return kept


def append_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Add lines of JSON to a file of a run folder, made if it is not there. Raises UserError as the disk does."""
    with disk_errors(f"writing {path.parent}"), open(path, "a", encoding="utf-8", opener=own_file) as file:
        file.write("".join(map(json_line, lines)))


def json_line(values: dict[str, Any]) -> str:
    """One line of metrics.jsonl; nan and inf become null."""
    return json.dumps(strict_json(values), allow_nan=False) + "\n"


def read_lines(path: Path, number: str = "step") -> list[dict[str, Any]]:
    """The lines of a file of a run folder, nan where they have null. Damaged lines are reported and left out.

    ``number`` is an integer that every line has: step in metrics.jsonl and the samples files, sample in
    bad_samples.jsonl. A last line that a killed run left half-written is left out.
    """
    if not path.exists():
        return []
    whole = read_regular(path).split(b"\n")[:-1]  # a whole line ends in a newline
    parsed = [(place, _parse(text, number)) for place, text in enumerate(whole, start=1)]
    for place, line in parsed:
        if line is None:
            print(f"warning: line {place} of {path} is damaged, and left out", file=sys.stderr, flush=True)
    lines = [line for _, line in parsed if line is not None]
    return [{name: math.nan if value is None else value for name, value in line.items()} for line in lines]


def _parse(text: bytes, number: str) -> dict[str, Any] | None:
    """One line; None for what no run has written."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and type(line.get(number)) is int else None


SUMMARY_FILE = "summary.json"
CONFIG_FILE, PLAN_FILE = "config.json", "plan.json"


@dataclass(frozen=True)
class RunHistory:
    """What a run folder tells: per logged step loss and z_std, per evaluation the kNN accuracy."""

    name: str
    title: str
    steps: tuple[int, ...]
    loss: tuple[float, ...]
    z_std: tuple[float, ...]
    knn_steps: tuple[int, ...]
    knn_top1: tuple[float, ...]  # percent
    dim: int  # width d of z
    classes: int | None  # for the line of chance; None where it is unknown
    steps_per_epoch: int
    method: str = "simsiam"
    stuck_loss: float | None = None  # of an encoder that tells no two samples apart, where the method has one


def read_run(run_dir: Path) -> RunHistory:
    """Read config.json, plan.json and metrics.jsonl. Raises UserError if they are missing, damaged or still empty."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is no folder: give a run folder of train/pretrain.py (its --run-dir)")
    config, plan = (_read_json(run_dir / name) for name in ("config.json", "plan.json"))
    try:
        lines = read_lines(run_dir / METRICS_FILE)
        logged = [line for line in lines if "loss" in line]
        knn = [line for line in lines if "knn_top1" in line]
        if not logged:
            raise UserError(f"{run_dir / METRICS_FILE} has no logged step yet: let the run do its first step")
        return RunHistory(
            name=str(run_dir),
            title=f"{config['model']['backbone']} at {config['views']['image_size']} px, "
            f"global batch {plan['global_batch']}, {plan['num_samples']:,} images",
            steps=tuple(line["step"] for line in logged),
            loss=tuple(line["loss"] for line in logged),
            z_std=tuple(line["z_std"] for line in logged),
            knn_steps=tuple(line["step"] for line in knn),
            knn_top1=tuple(line["knn_top1"] for line in knn),
            dim=config["model"]["dim"],
            classes=_count_classes(config["data"]),
            steps_per_epoch=plan["steps_per_epoch"],
            method=config.get("method", "simsiam"),  # the first runs knew no other
            stuck_loss=logged[-1].get("stuck_loss"),
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{run_dir} is no run folder that this version wrote ({error!r}); give another one") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: give a run folder of train/pretrain.py (its --run-dir)") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): give another run folder") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not what train/pretrain.py writes: give another run folder")
    return value


def _count_classes(data: str | list[Any]) -> int | None:
    """There is no line of chance for a mixture, and where the dataset has been moved since."""
    if isinstance(data, list):
        return None
    try:
        return len(read_object(Path(data) / "dataset.json")["classes"]) or None
    except (OSError, ValueError, KeyError, TypeError):
        return None
