"""Runs a Hypothesis test under atheris: inputs that reach new branches of our own modules are kept and mutated further.

    run_in_child(request, seconds + 60, lambda finish: fuzz(test, fixtures, seconds, finish))

libFuzzer never returns to its caller, so ``fuzz`` runs in a child (tests/helpers/bounded.py) and ends it. Hypothesis
makes the test's arguments from libFuzzer's bytes (``fuzz_one_input``), as its page on external fuzzers shows.
"""

from __future__ import annotations

import gc
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any, NoReturn

from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(str(ROOT / package) + "/" for package in ("pipeline", "model", "train", "tools"))
MOST_BYTES = 4096  # of an input: Hypothesis takes what it needs of them


def fuzz(
    test: Any, fixtures: dict[str, Any], seconds: float, finish: Callable[[str | None], NoReturn], seed: int = 1
) -> NoReturn:
    """Feed ``test`` for ``seconds``, then ``finish(None)``; at its first failure, finish with the traceback."""
    import atheris

    functions = [thing for thing in gc.get_objects() if type(thing) is FunctionType]
    for function in functions:
        if function.__code__.co_filename.startswith(OURS):
            atheris.instrument_func(function)
    arguments = test.hypothesis._given_kwargs | {name: st.just(value) for name, value in fixtures.items()}
    one_input = given(**arguments)(test.hypothesis.inner_test).hypothesis.fuzz_one_input
    end = time.monotonic() + seconds

    def try_one(content: bytes) -> None:
        try:
            one_input(content)
        except BaseException:  # noqa: BLE001  the parent raises it
            finish(f"{traceback.format_exc()}\nfuzz_one_input(bytes.fromhex('{content.hex()}'))")
        if time.monotonic() > end:
            finish(None)

    with tempfile.TemporaryDirectory() as corpus:
        chance = random.Random(seed)
        for number in range(20):  # long enough for any test's arguments: libFuzzer begins with a single byte
            (Path(corpus) / str(number)).write_bytes(chance.randbytes(64 << number % 5))
        limits = [f"-max_len={MOST_BYTES}", "-len_control=0", "-timeout=3600", "-rss_limit_mb=0"]  # the child's hold
        told = ["-verbosity=0", f"-artifact_prefix={corpus}/"]
        atheris.Setup([sys.argv[0], f"-seed={seed}", *limits, *told, corpus], try_one)
        atheris.Fuzz()
    raise AssertionError("libFuzzer has returned")
