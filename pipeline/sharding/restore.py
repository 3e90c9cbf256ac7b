"""Write lost shards of a complete dataset again: the same images in the same order give the recorded bytes.

Only tars that make_dataset wrote itself; a lost tar of others has to come from where it came from.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError
from pipeline.dataset.format import DATASET_FILE, PARTIAL_DIR, REPLACE
from pipeline.dataset.out_folder import OutFolder
from pipeline.sharding.workers import build_missing
from pipeline.sharding.write_shard import WriteJob

_NAME = re.compile(r"shard-(\d{6,})\.tar")


def lost_shards(out: OutFolder, info: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Number -> entry of dataset.json, ``info``, of each shard that has no tar of the recorded length, or no index."""
    lost, sizes = {}, out.sizes()
    for shard in info["shards"]:
        number = _NAME.fullmatch(shard["name"])
        if number is None:
            raise UserError(f"{DATASET_FILE} of {out.place} is damaged: no shard can be called {shard['name']!r}")
        if sizes.get(shard["name"]) != shard["bytes"] or shard["index"] not in sizes:
            lost[int(number[1])] = shard
    return lost


def restore_shards(
    job: WriteJob,
    fingerprint: str,
    info: dict[str, Any],
    lost: dict[int, dict[str, Any]],
    quiet: bool,
    in_process: bool,
    check: Callable[[], None],
) -> None:
    """Build the shards ``lost`` again. Raises UserError, leaving all tars as they are, for other bytes than recorded.

    ``fingerprint``: of the source as it is now. ``check`` is called now and then, and raises what should end the work.
    """
    out = job.store
    if fingerprint != info.get("source_fingerprint"):
        raise UserError(
            f"{out.place} has lost {len(lost)} of its shards (the first: {next(iter(lost.values()))['name']}), and "
            f"SOURCE has changed since it was made, so that they cannot be written again: restore SOURCE, or {REPLACE}"
        )
    aside = _set_aside(job.out, lost) if job.remote is None else []
    try:
        build_missing(job, job.options, quiet, in_process, numbers=sorted(lost), check=check)
        numbers = sorted(lost)
        records = dict(zip(numbers, job.records(numbers), strict=True))
        wrong = [shard["name"] for n, shard in lost.items() if (records[n] or {}).get("shard") != shard]
        if wrong:
            raise UserError(
                f"{wrong[0]} came out with other bytes than recorded ({len(wrong)} of {len(lost)} shards), as another "
                f"version of this program or of its libraries may write them: {REPLACE}"
            )
    except BaseException:
        out.remove([shard["name"] for shard in lost.values()])
        for name in aside:
            os.replace(job.out / PARTIAL_DIR / name, job.out / name)
        raise


def _set_aside(out: Path, lost: dict[int, dict[str, Any]]) -> list[str]:
    """Move what is left of lost tars to PARTIAL_DIR; returns their names. In a bucket each appears whole or not."""
    kept = [shard["name"] for shard in lost.values() if (out / shard["name"]).exists()]
    for name in kept:
        os.replace(out / name, out / PARTIAL_DIR / name)
    return kept
