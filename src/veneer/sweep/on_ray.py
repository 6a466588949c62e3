"""Workers of a sweep on a Ray cluster, one actor each."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import Hint, TrainingError
from ..training.progress import Progress, waiting
from ..wording import first_line
from .handle import Handle, Lost
from .options import LOCAL, SweepOptions
from .worker import Work, Worker


@contextmanager
def ray_workers(work: Work, progress: Progress) -> Iterator[list[Handle]]:
    """Workers on a cluster; they end with the block, and so does a cluster that was started for them.

    Raises:
        TrainingError: The cluster does not answer, or it has too little for the workers.
        VeneerError: The base cannot be loaded there.
    """
    options = work.options
    with waiting(progress, "Starting Ray" if options.ray == LOCAL else "Connecting to Ray"):
        ours = _connect(options)
    import ray

    actors: list[Any] = []
    try:
        count, demand, share = _layout(options, ray)
        kind, given = ray.remote(Worker), ray.put(work)
        actors += [kind.options(scheduling_strategy="SPREAD", **demand).remote(given) for _ in range(count)]
        handles: list[Handle] = [OnRay(f"worker {n}", actor) for n, actor in enumerate(actors, 1)]
        with waiting(progress, "Loading the base on Ray"):
            _each(handles, "load")
            for handle, packs in zip(handles, _each(handles, "prepare", share), strict=True):
                handle.packs = packs
        progress.say(f"Workers on Ray: {count}, each with {_told(demand)}")
        yield handles
    except Lost as lost:
        raise TrainingError(f"a worker on Ray ended before it could train: {lost}") from None
    finally:
        for actor in actors:
            ray.kill(actor)
        if ours:
            ray.shutdown()


def _each(handles: Sequence[Handle], method: str, *given: Any) -> list[Any]:
    """The answers of all workers, which work at the same time."""
    for handle in handles:
        handle.ask(method, *given)
    return [handle.answer() for handle in handles]


def _connect(options: SweepOptions) -> bool:
    """Connect to the cluster; returns whether it is ours to disconnect."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local = options.ray == LOCAL
    if local:  # what Ray does on systems where a firewall would ask: its ports are those of 127.0.0.1 alone
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    if ray.is_initialized():
        return False
    own: dict[str, Any] = {}
    if local:
        from ray._private import ray_constants

        ray_constants.ENABLE_RAY_CLUSTER = False  # the variable is too late where Ray was imported before
        cores = max(os.cpu_count() or 1, options.ray_workers or 1)
        own = {"include_dashboard": False, "_node_ip_address": "127.0.0.1", "num_cpus": cores}
    try:
        ray.init(options.ray, log_to_driver=False, logging_level=logging.ERROR, **own)
    except Exception as error:  # of any kind, a bare Exception too
        ray.shutdown()
        raise TrainingError(Hint("ray", options.ray), f": {first_line(error)}") from error
    return True


def _layout(options: SweepOptions, ray: Any) -> tuple[int, dict[str, int], int]:
    """How many workers there are, what each is given, and how many share the memory of one machine.

    Raises:
        TrainingError: There is too little.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus, cpus = (sum(int(node.get(kind, 0)) for node in nodes) for kind in ("GPU", "CPU"))
    count = options.ray_workers or gpus or len(nodes)
    if count > (gpus or cpus):
        raise TrainingError(
            Hint("ray_workers", count), f": the cluster has {f'{gpus} GPUs' if gpus else f'{cpus} CPUs'}"
        )
    if gpus:
        return count, {"num_gpus": 1, "num_cpus": 1}, 1
    share = math.ceil(count / len(nodes))
    return count, {"num_cpus": max(min(int(node.get("CPU", 0)) for node in nodes) // share, 1)}, share


def _told(demand: dict[str, int]) -> str:
    if "num_gpus" in demand:
        return "a GPU"
    return f"{demand['num_cpus']} CPU{'s' * (demand['num_cpus'] > 1)}"


class OnRay(Handle):
    """A worker that is an actor."""

    seconds = 1.0

    def __init__(self, name: str, actor: Any) -> None:
        super().__init__(name)
        self.actor = actor

    def ask(self, method: str, *given: Any) -> None:
        self.asked = getattr(self.actor, method).remote(*given)

    def answer(self) -> Any:
        import ray

        try:
            return ray.get(self.asked)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError as error:
            raise Lost(first_line(error)) from error

    @staticmethod
    def first(handles: Sequence[OnRay]) -> OnRay:
        import ray

        (done,), _ = ray.wait([handle.asked for handle in handles], num_returns=1)
        return next(handle for handle in handles if handle.asked == done)
