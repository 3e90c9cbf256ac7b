"""Where independent tasks run: --engine chooses, and Ray's side of it is here.

    with ray_engine(EngineConfig("ray")) as engine:
        for item, result in engine.run(work, items): ...

A task is small: paths and offsets travel to a worker, and a marker or a few numbers come back; images go straight from
the source to the shard. Its result lies in files before it ends, so a worker or a node may die at any time: its tasks
are given to another, and after the death of this process the same command goes on with what is missing.
"""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pipeline.common.errors import UserError, require
from pipeline.common.flags import own_flags
from pipeline.common.secrets import scrub

MOST_DEATHS = 3  # of workers, with the same task, after which it counts as deadly
CONNECT_S = 10.0  # for the machine of a cluster's head to answer
ANSWER_S = 60.0  # for Ray there
_POLL_S = 0.2
_ADDRESS = "auto"

Result = TypeVar("Result")


@own_flags
@dataclass(frozen=True)
class EngineConfig:
    """Where the work runs."""

    # Engine that runs the work. local: this machine. ray: a Ray cluster, whose nodes all need this package and Ray
    # (pip install 'siamstream[ray]').
    engine: Literal["local", "ray"] = "local"
    # Ray cluster to use. auto: the one that this machine belongs to; local: one that is started here and ends with the
    # command; HOST:PORT: its head. Default: auto.
    ray_address: str | None = None

    def __post_init__(self) -> None:
        if self.engine != "ray" and self.ray_address is not None:
            raise UserError(f"--ray-address {self.ray_address} goes with --engine ray only: add it, or leave this out")
        address = self.ray_address or _ADDRESS
        plain = address in ("auto", "local") or (":" in address and address.rpartition(":")[2].isdecimal())
        require("--ray-address", address, plain, "must be auto, local or HOST:PORT of the head, as in 10.0.0.1:6379")


@dataclass(frozen=True)
class NodeRate:
    """What one machine has done."""

    node: str
    tasks: int
    per_s: float  # of what the caller counts

    def __str__(self) -> str:
        return f"{self.node} {self.per_s:.0f}/s"


_NODES_SHOWN = 4  # in a progress bar


def describe_rates(nodes: Sequence[NodeRate]) -> str:
    """The rates of the fastest nodes, to be put behind others; "" for none."""
    count = f"{len(nodes)} node{'s' if len(nodes) > 1 else ''}"
    return ", ".join(["", count, *map(str, nodes[:_NODES_SHOWN])]) if nodes else ""


class RayEngine:
    """Tasks on the nodes of a Ray cluster."""

    def __init__(self, ray: Any, count: Callable[[Any], int] = lambda _: 1) -> None:
        """``count``: what a result counts for in the rates of nodes."""
        self._ray, self._count = ray, count
        self._started = time.monotonic()
        self._done: Counter[str] = Counter()
        self._tasks: Counter[str] = Counter()

    def run(self, work: Callable[[Any], Result], items: Iterable[Any]) -> Iterator[tuple[Any, Result]]:
        """``work`` of each item, and its result, as they end. ``items`` are taken as they are needed, few at a time.

        ``work`` is a function of a module; items and results are pickled, and small. Raises what ``work`` raises,
        UserError for a user's mistake on any node, and for an item with which MOST_DEATHS workers died.
        """
        remote = self._ray.remote(num_cpus=1, max_retries=0, scheduling_strategy="SPREAD")(_on_node)
        yield from self._run(lambda item: remote.remote(work, item), items, self._slots, force=True)

    def run_in_actors(
        self, make: Callable[[], Any], items: Iterable[Any], *, gpus: int, most: int | None = None
    ) -> Iterator[tuple[Any, Any]]:
        """``make()(item)`` of each item; ``make`` is called once in each actor, of which every GPU gets one.

        ``gpus``: of each actor; 0: as many actors as there are nodes with CPUs, each with the CPUs of the smallest.
        ``most``: actors at most.
        """
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        if gpus:
            count, resources = int(sum(node["Resources"].get("GPU", 0) for node in nodes)) // gpus, {"num_gpus": gpus}
            if count == 0:
                raise UserError("no node of the Ray cluster has a GPU: add --device cpu, or nodes with GPUs")
        else:
            cpus = [int(node["Resources"]["CPU"]) for node in nodes if node["Resources"].get("CPU", 0) >= 1]
            count, resources = len(cpus), {"num_cpus": min(cpus)}
        count = min(count, most or count)
        actor = self._ray.remote(max_restarts=0, scheduling_strategy="SPREAD", **resources)(_Actor)
        idle: deque[Any] = deque(actor.remote(make) for _ in range(count))
        users: dict[Any, Any] = {}

        def start(item: Any) -> Any:
            chosen = idle.popleft()
            ref = chosen.call.remote(item)
            users[ref] = chosen
            return ref

        def ended(ref: Any, died: bool) -> None:
            chosen = users.pop(ref)
            idle.append(actor.remote(make) if died else chosen)

        yield from self._run(start, items, lambda: count, ended)

    @property
    def gpus(self) -> int:
        """GPUs of the cluster."""
        return int(self._ray.cluster_resources().get("GPU", 0))

    def _slots(self) -> int:
        """Tasks under way at a time: two for each CPU, so that no worker waits for the next one."""
        return max(2, 2 * int(self._ray.cluster_resources().get("CPU", 0)))

    def _run(
        self,
        start: Callable[[Any], Any],
        items: Iterable[Any],
        slots: Callable[[], int],
        ended: Callable[[Any, bool], None] = lambda _ref, _died: None,
        force: bool = False,
    ) -> Iterator[tuple[Any, Any]]:
        errors, todo = self._ray.exceptions, iter(items)
        running: dict[Any, Any] = {}  # reference -> item
        again: deque[Any] = deque()
        deaths: Counter[int] = Counter()  # by the identity of the item, which is kept until it is done
        try:
            while True:
                room = slots() - len(running)
                for _ in range(room):
                    item = again.popleft() if again else next(todo, _NOTHING)
                    if item is _NOTHING:
                        break
                    running[start(item)] = item
                if not running:
                    return
                done, _ = self._ray.wait(list(running), num_returns=1, timeout=_POLL_S)
                for ref in done:
                    item = running.pop(ref)
                    try:
                        outcome: _Outcome = self._ray.get(ref)
                    except errors.RayTaskError:
                        raise
                    except errors.RayError as error:
                        ended(ref, True)
                        deaths[id(item)] += 1
                        if deaths[id(item)] >= MOST_DEATHS:
                            raise UserError(_deadly(error)) from None
                        print(f"note: {_reason(error)}; its task is given to another worker", file=sys.stderr)
                        again.append(item)
                        continue
                    ended(ref, False)
                    if outcome.mistake is not None:
                        raise UserError(f"on node {outcome.node}: {outcome.mistake}")
                    self._tasks[outcome.node] += 1
                    self._done[outcome.node] += self._count(outcome.result)
                    yield item, outcome.result
        finally:
            for ref in running:
                self._ray.cancel(ref, force=force)

    def rates(self) -> list[NodeRate]:
        """What each node has done so far, the fastest first."""
        seconds = max(time.monotonic() - self._started, 1e-3)
        rates = [NodeRate(node, self._tasks[node], self._done[node] / seconds) for node in self._tasks]
        return sorted(rates, key=lambda rate: -rate.per_s)


_NOTHING = object()


@dataclass(frozen=True)
class _Outcome:
    """The result of a task, or the message of a user's mistake."""

    node: str
    result: Any
    mistake: str | None = None


def _on_node(work: Callable[[Any], Any], item: Any) -> _Outcome:
    node = socket.gethostname()
    try:
        import ray

        node = f"{node} ({ray.util.get_node_ip_address()}, {ray.get_runtime_context().get_node_id()[:6]})"
        return _Outcome(node, work(item))
    except UserError as error:
        return _Outcome(node, None, scrub(str(error)))


class _Actor:
    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._work: Callable[[Any], Any] | None = None

    def call(self, item: Any) -> _Outcome:
        """One task. The first one makes what all use, so that a mistake in it is reported like others."""
        return _on_node(self._made, item)

    def _made(self, item: Any) -> Any:
        if self._work is None:
            self._work = self._make()
        return self._work(item)


def _reason(error: Exception) -> str:
    name = type(error).__name__
    if "OutOfMemory" in name:
        return "a worker was killed for lack of memory"
    return "a node was lost" if "Node" in name else "a worker died"


def _deadly(error: Exception) -> str:
    return (
        f"{_reason(error)}, {MOST_DEATHS} times with the same task, most likely for lack of memory: start Ray's nodes "
        "with fewer CPUs (ray start --num-cpus), then run the same command again; it goes on with what is missing"
    )


@contextmanager
def ray_engine(config: EngineConfig, count: Callable[[Any], int] = lambda _: 1) -> Iterator[RayEngine]:
    """Tasks on the cluster of --ray-address; every node is asked for its version of this package first.

    A program that is connected already keeps its connection. Raises UserError if there is no Ray, no cluster, or a
    node of another version.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # of --ray-address local; Ray's 15 gives way to all else
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray needs Ray: pip install 'siamstream[ray]', on every node") from None
    connected = ray.is_initialized()
    if not connected:
        _connect(ray, config.ray_address or _ADDRESS)
    try:
        if ray.cluster_resources().get("CPU", 0) < 1:
            raise UserError("the Ray cluster has no CPUs for tasks: start a node with `ray start --num-cpus N`")
        _check_nodes(ray)
        yield RayEngine(ray, count)
    finally:
        if not connected:
            ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    if address not in ("auto", "local"):
        _check_head(address)
    own: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error", **own)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
        if address == "auto":
            raise UserError(
                "--ray-address auto: no Ray cluster runs on this machine: `ray start --head` starts one, --ray-address "
                "local one for this command alone"
            ) from None
        raise UserError(f"--ray-address {address}: Ray cannot be used there: {_last_line(str(error))}") from None


def _check_head(address: str) -> None:
    """Raise UserError unless a Ray head of this version answers. In a process of its own: Ray itself tries for ever."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S):
            pass
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--ray-address {address} cannot be reached ({getattr(error, 'strerror', None) or error}): check the "
            "address that `ray start --head` printed, and the firewall"
        ) from None
    command = [sys.executable, "-c", _TRY, address]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"--ray-address {address}: no head of a Ray cluster answers there within {ANSWER_S:.0f} s: check the "
            "address that `ray start --head` printed"
        ) from None
    if "InvalidAuthToken" in tried.stderr:  # the last line does not say it
        raise UserError(
            f"--ray-address {address}: the Ray cluster asks for its token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN "
            "or ~/.ray/auth_token as on its head"
        )
    if tried.returncode:
        raise UserError(f"--ray-address {address}: Ray cannot be used there: {_last_line(tried.stderr)}")


_TRY = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='error')"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else "it does not say why"


def _check_nodes(ray: Any) -> None:
    """Raise UserError unless every node has this version of the package."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    version, module = _version(), __name__

    def ask() -> tuple[str | None, str]:  # pickled by value: a node may lack the module
        try:
            importlib.import_module(module)
            return importlib.import_module("siamstream").__version__, ""
        except ImportError as error:
            return None, str(error)

    nodes = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    asked = {
        ray.remote(num_cpus=0, max_retries=1)(ask)
        .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True))
        .remote(): node
        for node in nodes
    }
    for ref, node in asked.items():
        there, why = ray.get(ref)
        if there is None:
            raise UserError(f"node {nodes[node]} of the Ray cluster lacks this package ({why}): install it there too")
        if there != version:
            raise UserError(
                f"node {nodes[node]} of the Ray cluster has siamstream {there}, and this machine {version}: install "
                "the same version on all, or their bytes may differ"
            )


def _version() -> str:
    return str(importlib.import_module("siamstream").__version__)
