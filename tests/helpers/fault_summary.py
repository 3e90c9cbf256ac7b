"""The table at the end of ``make test-faults``: how many faults each test has tried, and how many were survived."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any


@dataclass
class Tally:
    """The faults of one test function, over all its parameters."""

    tried: int = 0
    survived: int = 0
    seconds: float = 0.0


def tallies(reports: dict[str, list[Any]]) -> dict[str, Tally]:
    """Test function -> its faults; ``reports`` as pytest's terminal reporter keeps them, by outcome.

    A test is one fault, or as many as its property ``tried`` says; a fuzzer that fails counts its last example as lost.
    """
    found: dict[str, Tally] = defaultdict(Tally)
    for outcome in ("passed", "failed"):
        for report in reports.get(outcome, []):
            if report.when != "call" or "faults" not in report.keywords:
                continue
            tally = found[report.nodeid.partition("[")[0]]
            tried = max(1, int(dict(report.user_properties).get("tried", 1)))
            tally.tried += tried
            tally.survived += tried - (outcome == "failed")
            tally.seconds += report.duration
    return dict(found)


def table(found: dict[str, Tally]) -> list[str]:
    """The lines of the table, and a sum."""
    lines = [f"{'tried':>7} {'survived':>9} {'seconds':>8}  test"]
    whole = Tally(
        sum(tally.tried for tally in found.values()),
        sum(tally.survived for tally in found.values()),
        sum(tally.seconds for tally in found.values()),
    )
    for name, tally in [*sorted(found.items()), ("all together", whole)]:
        lines.append(f"{tally.tried:7d} {tally.survived:9d} {tally.seconds:8.1f}  {name.removeprefix('tests/')}")
    return lines
