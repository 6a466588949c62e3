"""The statistics of the study of sweeps, on losses whose best rates are known."""

from __future__ import annotations

import math
from types import ModuleType

import pytest

from tests.programs import load_program


@pytest.fixture(scope="module")
def study() -> ModuleType:
    with pytest.MonkeyPatch.context() as kept:
        for name in ("data", "side_by_side", "sequence_classification"):
            load_program(kept, name, f"examples/{name}.py")
        return load_program(kept, "sweep_study", "examples/sweep_study.py")


def test_the_best_rate_lies_between_those_that_were_tried(study: ModuleType) -> None:
    def loss(x: float, best: float) -> float:
        return math.exp((x - best) ** 2)

    tried = (-4.0, -3.5, -3.25, -3.0, -2.5)
    curve = study.Curve({10**x: [loss(x, best) for best in (-3.3, -3.1, -2.0, -9.0)] for x in tried})
    # Of the last two seeds the best rate lies outside: it is the outermost one that was tried.
    assert [round(x, 6) for x in curve.optima()] == [-3.3, -3.1, -2.5, -4.0]
    inside = study.Curve({1e-4: [2.0], 1e-3: [1.0], 1e-2: [math.inf]})
    assert inside.optima() == [-3.0] and inside.best == 1e-3 and inside.beyond == 0
    assert study.Curve({1e-4: [1.0], 1e-3: [2.0]}).beyond == -1
    assert study.Curve({1e-4: [2.0], 1e-3: [1.0]}).beyond == 1


@pytest.mark.parametrize(
    ("values", "verdict", "said"),
    [
        ([4.0, 5.0, 6.0], "held", "+5.0 % (+2.5 to +7.5)"),
        ([-4.0, -5.0, -6.0], "did not hold", "-5.0 % (-7.5 to -2.5)"),
        ([1.0, 2.0, 3.0], "undecided", "+2.0 % (-0.5 to +4.5)"),
        ([5.0], "undecided", "+5.0 %"),
    ],
)
def test_a_claim_holds_if_the_whole_interval_says_so(
    study: ModuleType, values: list[float], verdict: str, said: str
) -> None:
    finding = study.Finding("more than 0", "", values, (0.0, math.inf))
    assert (finding.verdict, str(finding)) == (verdict, said)
