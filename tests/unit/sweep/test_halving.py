"""Successive halving on made-up losses, without training."""

from __future__ import annotations

import math

import pytest

from veneer.sweep.halving import Halving
from veneer.sweep.options import SweepOptions
from veneer.sweep.trial import Trial, trials

OPTIONS = SweepOptions(model="m", data="d", output="o", max_steps=9, validation_split=0.1)


def made(count: int, **options: object) -> list[Trial]:
    own = SweepOptions(**{**vars(OPTIONS), **options})
    return trials(own, {"learning_rate": [(n + 1) / 1000 for n in range(count)]}, 16)


def go(found: list[Trial], together: int, spoiled: frozenset[tuple[str, int]] = frozenset()) -> Halving:
    """Train as `Sweep` does, with at most so many runs at once; a run's loss is its number at every rung."""
    halving = Halving(found)
    while True:
        while len([t for t in found if t.state == "training"]) < together and (seeds := halving.next()):
            for trial in seeds:
                trial.state, trial.rung = "training", trial.rung + 1
        training = [t for t in found if t.state == "training"][:together]
        if not training:
            return halving
        for trial in training:
            if (trial.name, trial.rung) in spoiled:
                trial.state = "diverged"
                continue
            trial.step = trial.rungs[trial.rung]
            trial.evaluations.append(float(trial.name.partition("-")[2]))
            trial.state = "done" if trial.step == trial.steps else "paused"
        for trial in halving.out():
            trial.state = "stopped"


def test_a_third_goes_on_at_each_rung() -> None:
    found = made(12)
    assert {trial.rungs for trial in found} == {(1, 3, 9)}
    go(found, 100)
    assert [trial.step for trial in found] == [9, 9, 3, 3] + [1] * 8
    assert sum(t.seen(t.step) for t in found) <= 0.3 * sum(t.seen(t.steps) for t in found)


@pytest.mark.parametrize("together", [1, 2, 5])
@pytest.mark.parametrize("backwards", [False, True])
def test_the_best_is_found_whatever_fits_together(together: int, backwards: bool) -> None:
    found = made(12)
    if backwards:  # another order of good and bad ones
        for trial in found:
            trial.name = f"run-{13 - int(trial.name.partition('-')[2]):02}"
    go(found, together)
    best = min(found, key=lambda trial: trial.name)
    assert best.state == "done" and best.step == 9
    assert sum(trial.step for trial in found) <= 0.5 * 12 * 9
    assert not [trial for trial in found if trial.state in ("waiting", "training")]


def test_few_runs_or_steps_are_compared_less_often() -> None:
    assert {trial.rungs for trial in made(2)} == {(9,)}
    assert {trial.rungs for trial in made(8)} == {(3, 9)}
    assert {trial.rungs for trial in made(12, max_steps=4)} == {(2, 4)}
    assert {trial.rungs for trial in made(12, early_stop=False)} == {(9,)}


def test_seeds_are_compared_by_their_mean_and_go_on_together() -> None:
    found = made(3, seeds=2)
    assert [trial.options.seed for trial in found] == [0, 1] * 3
    go(found, 100)
    assert [trial.state for trial in found] == ["done", "done", "paused", "paused", "stopped", "stopped"]


def test_who_diverged_is_passed_by() -> None:
    found = made(9)
    go(found, 100, frozenset({("run-1", 0), ("run-2", 1)}))
    assert [trial.state for trial in found[:4]] == ["diverged", "diverged", "done", "paused"]


def test_if_the_finalist_diverges_the_next_one_comes_to_the_end() -> None:
    found = made(9)
    halving = go(found, 100, frozenset({("run-1", 2)}))
    assert [trial.state for trial in found[:3]] == ["diverged", "done", "stopped"]
    assert halving.losses(2) == {1: 2.0, 0: math.inf}


def test_batches_of_a_step_are_those_of_its_epoch() -> None:
    (one, *_) = made(2, batch_size=3, gradient_accumulation_steps=2)
    rows = list(range(16))
    seen = []
    for step in range(3):
        one.step = step
        batches = one.batches(rows)
        assert max(map(len, batches)) <= 3
        seen += [row for batch in batches for row in batch]
        assert one.seen(step + 1) == len(seen)
    assert sorted(seen) == rows and seen != rows
    one.step = 3
    assert [row for batch in one.batches(rows) for row in batch] != seen[:6]
