"""Repeat one of the paper's experiments at the scale of this machine.

    python tools/reproduce.py TABLE --data DIR --val-data DIR --budget MINUTES [--seeds N]

Every variant of the table is a run of train/pretrain.py and one of train/linear.py, with the same flags except those
that the table varies. A short pilot is timed, and all runs get as many epochs as fit into the budget together. Then
TABLE.md and TABLE.png are written. The same command continues a stopped sweep.
"""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path
from types import FrameType

import tyro

from pipeline.common.errors import UserError, exit_on_user_error
from pipeline.dataset.dataset import ShardSet
from tools.reproduction.paper_tables import METHODS_TABLE, TABLES, PaperTable
from tools.reproduction.report import write_report
from tools.reproduction.scale import RECIPES, fitting
from tools.reproduction.sweep import EXIT_STOPPED, ReproduceConfig, Sweep


def main() -> None:
    """The command."""
    config = tyro.cli(ReproduceConfig, description=__doc__)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        reproduce(config)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(EXIT_STOPPED)


def reproduce(config: ReproduceConfig) -> None:
    """Run the sweep and write its page. Raises UserError for a user's mistake."""
    table = choose_table(config)
    train, val = ShardSet.open(config.data), ShardSet.open(config.val_data)
    for flag, dataset in (("--data", train), ("--val-data", val)):
        if not dataset.has_labels:
            raise UserError(f"{flag} {dataset.path} has no labels, and accuracies need them: shard it with labels")
    out = config.out or Path("runs") / "reproduce" / config.table
    device, processes = choose_device(config)
    sweep = Sweep(config, out, train, device, processes)
    scale = sweep.settle_scale(table, val)
    variants = fitting(table, train.num_samples)
    for number, variant in enumerate(variants, 1):
        print(f"\n== {number} of {len(variants)}: {variant.label}", flush=True)
        sweep.run(variant, scale)
    page = write_report(
        table,
        variants,
        {variant.name: sweep.folders(variant) for variant in variants},
        folder=config.docs or out,
        name=config.table,
        recipe=RECIPES[scale.recipe].name,
        val_samples=val.num_samples,
        command=command_of(config),
    )
    print(f"\n{page}\n{page.with_suffix('.png')}")


def choose_table(config: ReproduceConfig) -> PaperTable:
    """Raises UserError for an unknown table."""
    tables = {**TABLES, "methods": METHODS_TABLE}
    if config.table not in tables:
        known = "\n".join(f"  {name:<17} {table.title} ({table.source})" for name, table in tables.items())
        raise UserError(f"table {config.table} is unknown; known are\n{known}")
    return tables[config.table]


def choose_device(config: ReproduceConfig) -> tuple[str, int]:
    """``cuda`` or ``cpu``, and the processes of a run. Raises UserError for --device cuda without a GPU."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() and config.device != "cpu" else 0
    if config.device == "cuda" and gpus == 0:
        raise UserError("--device cuda, but PyTorch finds no GPU here: take --device cpu")
    return ("cuda" if gpus else "cpu"), config.processes or max(1, gpus)


def command_of(config: ReproduceConfig) -> str:
    """The command that repeats the sweep."""
    given = [config.table, "--data", str(config.data), "--val-data", str(config.val_data)]
    more = ["--device", config.device] if config.device != "auto" else []
    more += ["--seeds", str(config.seeds)] if config.seeds > 1 else []
    return "python tools/reproduce.py " + shlex.join([*given, "--budget", f"{config.budget:g}", *more])


def _interrupt(_: int, __: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    exit_on_user_error(main)
