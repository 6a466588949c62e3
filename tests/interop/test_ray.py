"""`veneer sweep --ray` on a cluster of two workers on this machine, bound to 127.0.0.1."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.unit.sweep.tiny import GRID, same, tiny_options
from tests.unit.training.tiny import Told, saved_tiny
from veneer.errors import TrainingError
from veneer.sweep import on_ray
from veneer.sweep import sweep as module
from veneer.sweep.on_ray import OnRay, ray_workers
from veneer.sweep.on_ray import _connect as connect
from veneer.sweep.options import SweepOptions
from veneer.sweep.packs import Packs
from veneer.sweep.sweep import sweep
from veneer.sweep.worker import Work, Worker
from veneer.training.progress import Silent
from veneer.training.stopping import Interrupted

TWO: dict[str, Any] = {"ray": "local", "ray_workers": 2}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> SweepOptions:
    place = tmp_path_factory.mktemp("data")
    return tiny_options(saved_tiny(place / "base"), place, exact=True)


@pytest.fixture(scope="module")
def alone(options: SweepOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep without Ray."""
    place = tmp_path_factory.mktemp("alone") / "out"
    sweep(replace(options, output=str(place)), GRID)
    return place


def test_without_a_cluster_the_address_is_refused(options: SweepOptions, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"ray='auto': .*Ray"):
        sweep(replace(options, output=str(tmp_path / "out"), ray="auto"), GRID)


@pytest.fixture(scope="module")
def cluster(options: SweepOptions) -> Iterator[None]:
    """One cluster for all sweeps, which would start and end one each."""
    connect(replace(options, **TWO))
    import ray

    assert ray.nodes()[0]["NodeManagerAddress"] == "127.0.0.1"
    yield
    ray.shutdown()


def then_lost(lose: Callable[[OnRay], object]) -> Callable[..., None]:
    """In place of `OnRay.ask`: something is lost when the second worker has been told to train."""
    trained: list[OnRay] = []
    ask = OnRay.ask

    def asked(handle: OnRay, method: str, *given: Any) -> None:
        ask(handle, method, *given)
        if method == "train":
            trained.append(handle)
            if len(trained) == 2:
                lose(handle)

    return asked


def test_workers_on_ray_come_to_the_same_if_one_is_killed_and_if_they_are_interrupted(
    cluster: None, options: SweepOptions, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    told = Told()
    own = replace(options, output=str(tmp_path / "killed"), **TWO)
    with monkeypatch.context() as patched:
        patched.setattr(OnRay, "ask", then_lost(lambda handle: ray.kill(handle.actor)))
        sweep(own, GRID, told)
    (line,) = (line for line in told.lines if " is gone (" in line)
    assert "others take over" in line and "Workers on Ray: 2, each with 1 CPU" in told.lines
    assert same(tmp_path / "killed", alone)
    # Begun on Ray, finished without, and the reverse.
    from tests.unit.sweep.test_sweep import stopped_after

    for first, then in ((TWO, {}), ({}, TWO)):
        cut = replace(options, output=str(tmp_path / f"cut-{len(then)}"))
        with stopped_after(1, monkeypatch), pytest.raises(Interrupted):
            sweep(replace(cut, **first), GRID)
        sweep(replace(cut, resume=True, **then), GRID)
        assert same(Path(cut.output), alone)


def test_runs_that_diverge_or_do_not_fit_are_handled_by_their_workers(
    cluster: None, options: SweepOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Narrow(Worker):
        """A worker whose memory holds one run."""

        def prepare(self, share: int = 1) -> Packs:
            packs, step = super().prepare(share), self.family.forward_backward

            def narrow(batches: Any, loss: Any) -> Any:
                if len(batches) > 1:
                    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")
                return step(batches, loss)

            self.family.forward_backward = narrow  # type: ignore[method-assign, assignment]
            return packs

    grid = {"learning_rate": [1e-2, 1e30, 2e-2, 3e-2]}
    own, told = replace(options, early_stop=False), Told()
    found = sweep(replace(own, output=str(tmp_path / "alone")), grid)
    assert [run["state"] for run in found["runs"]] == ["done", "diverged", "done", "done"]
    monkeypatch.setattr(on_ray, "Worker", Narrow)
    sweep(replace(own, output=str(tmp_path / "ray"), **TWO), grid, told)
    assert told.lines.count("Out of memory with 2 runs at once: half as many from here on.") == 2
    assert "  run-2 (learning_rate=1e+30): diverged after step 1" in told.lines
    assert same(tmp_path / "ray", tmp_path / "alone")


def test_what_a_worker_refuses_is_said_as_without_ray(
    cluster: None, options: SweepOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = replace(options, output=str(tmp_path / "out"), memory="100kB", **TWO)
    with pytest.raises(TrainingError, match="memory='100kB' is too little"):
        sweep(own, GRID)

    def ended(handle: OnRay) -> Any:
        raise module.Lost("the machine was switched off")

    monkeypatch.setattr(OnRay, "answer", ended)
    with (
        pytest.raises(TrainingError, match="ended before it could train: the machine was switched off"),
        ray_workers(Work(own, [], [], [], 0), Silent()),
    ):
        pass


def test_a_machine_that_is_lost_takes_no_run_with_it(
    cluster: None, options: SweepOptions, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray.cluster_utils import Cluster

    nodes = Cluster()
    nodes.head_node = ray._private.worker._global_node
    second = nodes.add_node(wait=False, num_cpus=1, node_ip_address="127.0.0.1")
    while len(ray.nodes()) < 2:
        time.sleep(0.1)
    told = Told()
    # Both workers train by then, one on each machine.
    lost = then_lost(lambda _: nodes.remove_node(second, allow_graceful=False))
    monkeypatch.setattr(OnRay, "ask", lost)
    sweep(replace(options, output=str(tmp_path / "out"), **TWO), GRID, told)
    (line,) = (line for line in told.lines if " is gone (" in line)
    assert "others take over" in line
    assert same(tmp_path / "out", alone)


def listening(parent: psutil.Process) -> set[str]:
    """The addresses that a process and its children listen on."""
    found = set()
    for process in (parent, *parent.children(recursive=True)):
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                found.add(connection.laddr.ip.removeprefix("::ffff:"))
    return found


def test_the_command_starts_a_cluster_of_this_machine_alone_and_ends_it(
    options: SweepOptions, tmp_path: Path
) -> None:
    words = ["sweep", "--model", options.model, "--data", options.data, "--output", str(tmp_path / "out")]
    words += ["--batch-size", "1", "--epochs", "400", "--grid", "learning_rate=1e-3,1e-2", "--ray"]
    process = subprocess.Popen(
        [sys.executable, "-m", "veneer", *words, "--ray-workers", "2"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if "2 configurations" in line:
            break
    parent = psutil.Process(process.pid)
    children = parent.children(recursive=True)
    assert children and listening(parent) == {"127.0.0.1"}
    time.sleep(3.0)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said.append(process.stderr.read())
    process.stderr.close()
    assert process.wait(timeout=120) == 130, "".join(said)
    last = "".join(said).splitlines()[-3:]
    assert last[0].startswith("Stopped after ") and last[1].endswith(" --resume")
    assert " --ray local --ray-workers 2 " in last[1]
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["state"] == "state-1"
    _, left = psutil.wait_procs(children, timeout=60)
    assert not left
