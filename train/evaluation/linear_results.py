"""Results of a linear evaluation: accuracies, metrics.jsonl, summary.json, and the checkpoint that --resume needs."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.common.errors import UserError
from pipeline.common.files import disk_errors, write_json
from pipeline.common.locks import FolderLock
from train.distributed.collectives import on_all_ranks, on_rank0, print0
from train.distributed.process_group import DistContext
from train.storage.checkpoints import CHECKPOINTS, check_same_run, find_checkpoint, load_checkpoint, save_checkpoint
from train.storage.run_folder import METRICS_FILE, SUMMARY_FILE, append_lines, claim_run_dir, cut_off


@dataclass(frozen=True)
class HeadScore:
    """One classifier on the validation set."""

    base_lr: float
    loss: float  # mean over the last epoch of training
    correct1: int
    correct5: int
    total: int

    @property
    def top1(self) -> float:
        return 100.0 * self.correct1 / self.total

    @property
    def top5(self) -> float:
        """Share of the images whose class is among the first five, in percent."""
        return 100.0 * self.correct5 / self.total

    def describe(self) -> str:
        return f"base lr {self.base_lr:g}: top-1 {self.top1:.2f} %, top-5 {self.top5:.2f} %, loss {self.loss:.4f}"

    def as_json(self) -> dict[str, float]:
        return {**asdict(self), "val_top1": self.top1, "val_top5": self.top5}


@dataclass(frozen=True)
class Outcome:
    """All classifiers after an epoch."""

    epoch: int  # epochs done
    heads: tuple[HeadScore, ...]

    @property
    def best(self) -> HeadScore:
        """The one with the highest top-1, the first of equals."""
        return max(self.heads, key=lambda head: head.correct1)

    def edge_of_sweep(self) -> str | None:
        """A line for people where the best rate of several is the lowest or the highest, and others may be better."""
        rates, best = sorted(head.base_lr for head in self.heads), self.best.base_lr
        if len(rates) == 1 or best not in (rates[0], rates[-1]):
            return None
        which, beyond = ("highest", 3 * best) if best == rates[-1] else ("lowest", best / 3)
        return f"note: the best rate, {best:g}, is the {which} of --lr-sweep: try {beyond:.2g} as well"


class LinearRun:
    """The state and the files of one evaluation. Without a folder it only remembers."""

    def __init__(
        self,
        folder: Path | None,
        dist: DistContext,
        identity: dict[str, Any],
        base_lrs: tuple[float, ...],
        heads: nn.Module,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """``identity``: what must be equal for an evaluation to go on."""
        self._folder, self._dist, self._identity, self._base_lrs = folder, dist, identity, base_lrs
        self._heads, self._optimizer = heads, optimizer
        self._outcome: Outcome | None = None
        self._lock: FolderLock | None = None  # on rank 0

    def open(self, resume: bool, held: ExitStack) -> int:
        """Claim the folder; returns how many epochs are done. Raises SharedError for mistakes. A collective.

        ``held`` keeps the folder's lock.
        """
        if self._folder is None:
            return 0
        folder = self._folder
        found = on_rank0(self._dist, lambda: self._look(folder, resume, held))
        if found is not None:
            on_all_ranks(self._dist, lambda: self._load(found))
        done = self._outcome.epoch if self._outcome else 0
        if resume:
            print0(self._dist, f"--resume: {done} epochs are done")
        return done

    def _look(self, folder: Path, resume: bool, held: ExitStack) -> Path | None:
        self._lock = claim_run_dir(folder, held)
        if (folder / METRICS_FILE).exists() and not resume:
            raise UserError(f"--run-dir {folder} already holds a run: add --resume to go on with it, or name another")
        found = find_checkpoint(folder / CHECKPOINTS).path if resume else None
        if found is None:
            cut_off(folder / METRICS_FILE, 0)  # an epoch whose checkpoint was never written comes again
        return found

    def _load(self, path: Path) -> None:
        state = load_checkpoint(path)
        if "heads" not in state:
            raise UserError(f"{path} is no checkpoint of a linear evaluation: name another --run-dir")
        check_same_run(state["identity"], self._identity, path)
        self._heads.load_state_dict(state["heads"])
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state["optimizer"]})
        self._outcome = Outcome(state["epoch"], tuple(HeadScore(**head) for head in state["scores"]))
        if self._dist.is_main:
            cut_off(path.parent.parent / METRICS_FILE, state["step"])

    def epoch_done(self, epoch: int, step: int, losses: list[float], correct: list[list[int]], total: int) -> Outcome:
        """Note the accuracies after ``epoch`` epochs, write them and a checkpoint. SharedError for a full disk."""
        heads = (
            HeadScore(base_lr, loss, correct1, correct5, total)
            for base_lr, loss, (correct1, correct5) in zip(self._base_lrs, losses, correct, strict=True)
        )
        outcome = self._outcome = Outcome(epoch, tuple(heads))
        if self._folder is not None:
            folder = self._folder
            on_rank0(self._dist, lambda: self._write(folder, outcome, step))
        return outcome

    def _write(self, folder: Path, outcome: Outcome, step: int) -> None:
        assert self._lock is not None
        self._lock.check()
        lines = [{"epoch": outcome.epoch, "step": step, **head.as_json()} for head in outcome.heads]
        append_lines(folder / METRICS_FILE, lines)
        state = {
            "epoch": outcome.epoch,
            "step": step,
            "heads": self._heads.state_dict(),
            "optimizer": self._optimizer.state_dict()["state"],
            "scores": [asdict(head) for head in outcome.heads],
            "identity": self._identity,
        }
        save_checkpoint(folder / CHECKPOINTS, state, outcome.epoch, keep=1)

    def outcome(self) -> Outcome:
        """The accuracies after the last epoch."""
        assert self._outcome is not None
        return self._outcome

    def finish(self, more: dict[str, Any]) -> None:
        """Write summary.json. A collective."""
        if self._folder is None:
            return
        folder, outcome = self._folder, self.outcome()
        values = {"epochs": outcome.epoch, **outcome.best.as_json(), "heads": [h.as_json() for h in outcome.heads]}

        def write() -> None:
            with disk_errors(f"writing {folder}"):
                write_json(folder / SUMMARY_FILE, {"finished": True, **values, **more})

        on_rank0(self._dist, write)
