"""Sweeps of several workers: the same as with one, whoever trains what, and whoever is lost."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.sweep.tiny import GRID, same, tiny_options
from tests.unit.training.tiny import Told
from veneer.errors import TrainingError
from veneer.sweep import sweep as module
from veneer.sweep.handle import Handle, Here, Lost
from veneer.sweep.on_ray import _layout
from veneer.sweep.options import SweepOptions
from veneer.sweep.sweep import sweep
from veneer.sweep.trial import trials
from veneer.sweep.worker import Work, Worker


@pytest.fixture(scope="module")
def options(base: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepOptions:
    return tiny_options(base, tmp_path_factory.mktemp("data"), exact=True)


@pytest.fixture(scope="module")
def alone(options: SweepOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("alone") / "out"
    sweep(replace(options, output=str(place)), GRID)
    return place


def test_early_comparisons_are_on_enough_labels(options: SweepOptions) -> None:
    def compared(answer: int, classes: list[str] | None = None) -> list[int]:
        rows = [{"input_ids": [1] * 60, "labels": [-100] * (60 - answer) + [1] * answer}] * 900
        if classes:
            rows = [{"input_ids": [1] * 60, "labels": 1}] * 900
        every = trials(replace(options, max_steps=180), {"lora_r": list(range(1, 10))}, 900)
        assert every[0].rungs == (20, 60, 180)
        worker = Worker(Work(options, every, [], rows, 0, classes))
        return [len(worker._held_out(rung)) for rung in range(3)]

    # As many as were trained on, and where that is little text, more.
    assert compared(50) == [80, 240, 900]
    assert compared(1) == compared(1, ["a", "b"]) == [256, 256, 900]
    assert compared(2) == [128, 240, 900]


class Mortal(Here):
    """A worker that is gone when it is asked for something the nth time."""

    def __init__(self, worker: Worker, name: str, method: str = "", left: int = 0) -> None:
        super().__init__(worker)
        self.name, self.method, self.left = name, method, left

    def answer(self) -> Any:
        if self.asked == self.method:
            self.left -= 1
            if self.left < 0:
                raise Lost("the machine was switched off")
        return super().answer()

    def ask(self, method: str, *given: Any) -> None:
        self.asked = method
        super().ask(method, *copy.deepcopy(given))  # as another process has them


@contextmanager
def workers(monkeypatch: pytest.MonkeyPatch, *ends: tuple[str, int]) -> Iterator[None]:
    """So many workers in place of the one; each ends when it has answered a method so often."""

    @contextmanager
    def made(work: Any, progress: Any) -> Iterator[list[Handle]]:
        every: list[Handle] = [Mortal(Worker(work), f"worker {n}", *end) for n, end in enumerate(ends, 1)]
        for one in every:
            one.call("load")
            one.packs = one.call("prepare", len(every))
        yield every

    with monkeypatch.context() as patched:
        patched.setattr(module, "_workers", made)
        yield


def test_two_workers_come_to_the_same(
    options: SweepOptions, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with workers(monkeypatch, ("", 0), ("", 0)):
        sweep(replace(options, output=str(tmp_path / "two")), GRID)
    assert same(tmp_path / "two", alone)
    sweep(replace(options, output=str(tmp_path / "small"), memory="1MB"), GRID)
    assert same(tmp_path / "small", alone)


@pytest.mark.parametrize(("method", "answers"), [("begin", 0), ("train", 1), ("train", 3), ("states", 0)])
def test_the_runs_of_a_lost_worker_are_given_to_another(
    method: str,
    answers: int,
    options: SweepOptions,
    alone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = Told()
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    with workers(monkeypatch, ("", 0), (method, answers)):
        sweep(replace(options, output=str(tmp_path / "out")), GRID, told)
    (line,) = (line for line in told.lines if "gone" in line)
    assert line.startswith("worker 2 is gone (the machine was switched off). It had run-")
    assert same(tmp_path / "out", alone)


def test_without_any_worker_the_sweep_is_saved_and_goes_on(
    options: SweepOptions, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = replace(options, output=str(tmp_path / "out"))
    with (
        workers(monkeypatch, ("train", 3), ("train", 1)),
        pytest.raises(TrainingError, match=r"no worker is left; .* switched off\. The sweep .* resume=True"),
    ):
        sweep(own, GRID)
    sweep(replace(own, resume=True), GRID)
    assert same(tmp_path / "out", alone)


def test_workers_are_as_many_as_gpus_or_machines(options: SweepOptions) -> None:
    class Cluster:
        def __init__(self, *machines: dict[str, float]) -> None:
            self.machines = machines

        def nodes(self) -> list[dict[str, Any]]:
            gone = {"Alive": False, "Resources": {"GPU": 9.0}}
            return [gone, *({"Alive": True, "Resources": one} for one in self.machines)]

    two = Cluster({"CPU": 8.0}, {"CPU": 4.0})
    assert _layout(options, two) == (2, {"num_cpus": 4}, 1)
    four = replace(options, ray="local", ray_workers=4)
    assert _layout(four, two) == (4, {"num_cpus": 2}, 2)
    assert _layout(options, Cluster({"CPU": 8.0, "GPU": 2.0})) == (2, {"num_gpus": 1, "num_cpus": 1}, 1)
    with pytest.raises(TrainingError, match="ray_workers=4: the cluster has 2 GPUs"):
        _layout(four, Cluster({"CPU": 8.0, "GPU": 2.0}))
    with pytest.raises(TrainingError, match="ray_workers=4: the cluster has 3 CPUs"):
        _layout(four, Cluster({"CPU": 3.0}))
