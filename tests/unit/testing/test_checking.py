"""`check` finds what does not hold, and says what was not tried."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.processes import run_python
from veneer.errors import ConfigError
from veneer.inits import Init, InitResult
from veneer.inits.random import Default
from veneer.testing import CASES, LAWS, LawBroken, LayerCase, check, registered_for_now
from veneer.variants import Variant, get
from veneer.variants.plain import Plain

LINEAR = CASES[:1]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    with registered_for_now():
        yield


def test_veneers_own_hold() -> None:
    report = check(Plain, cases=CASES[-1:], dtypes=[torch.float64])
    assert not report.broken and not report.refused
    assert {law for law, _, _ in report.tried} == {law.name for law in LAWS}
    assert check(Default, cases=LINEAR, dtypes=[torch.float32]).tried


def test_all_that_does_not_hold_is_named() -> None:
    class Forgetful(Variant):
        """Its merge forgets the scaling that its forward has."""

        name = "forgetful"

        def forward(self, layer: Any, name: str, x: Tensor, result: Tensor, base: Any) -> Tensor:
            return layer.add_branch(name, x, result)

        def merged(self, weight: Tensor, delta: Tensor, extra: Any) -> Tensor:
            return weight + delta / 1.5

    with pytest.raises(LawBroken) as error:
        check(Forgetful, cases=LINEAR, dtypes=[torch.float32])
    for law in ("merged_equals_unmerged", "the_branch_is_the_delta", "merging_one_of_two"):
        assert law in str(error.value)
    assert "unmerge_gives_the_base_back" not in str(error.value)


def test_an_init_that_is_no_identity_is_found() -> None:
    class Loud(Init):
        names = ("loud",)

        def __call__(self, request: Any) -> InitResult:
            return InitResult(torch.ones(request.shape_a), torch.ones(request.shape_b))

    with pytest.raises(LawBroken, match="identity"):
        check(Loud, cases=LINEAR, dtypes=[torch.float32])


def test_refusals_are_told_and_nothing_tried_is_an_error() -> None:
    class Shy(Variant):
        name = "shy"

        def refuses(self, spec: Any, layer_type: str) -> str | None:
            return "not this one" if layer_type == "Conv2d" else None

        forward = Plain.forward
        merged = Plain.merged

    report = check(Shy, cases=[CASES[0], CASES[-1]], dtypes=[torch.float32])
    assert list(report.refused) == ["Conv2d with groups"] and "not this one" in str(report.refused)
    with pytest.raises(ConfigError, match="nothing could be tried on Shy"):
        check(Shy, cases=CASES[-1:])
    with pytest.raises(ConfigError, match="not a Variant"):
        check(nn.Linear)  # type: ignore[arg-type]


def test_what_is_registered_for_now_is_forgotten() -> None:
    with registered_for_now():

        class Brief(Variant):
            name = "brief"
            forward = Plain.forward
            merged = Plain.merged

        assert isinstance(get("brief"), Brief)
    with pytest.raises(ConfigError, match="brief"):
        get("brief")


def test_cases_of_ones_own() -> None:
    case = LayerCase("wide", lambda: nn.Linear(3, 7), lambda: torch.randn(2, 3), {"r": 2})
    assert {name for _, name, _ in check(Plain, cases=[case]).tried} == {"wide"}


def test_without_assertions_nothing_would_be_tried() -> None:
    code = (
        "from veneer.errors import ConfigError\nfrom veneer.testing import check\n"
        "from veneer.variants.plain import Plain\n"
        "try:\n    check(Plain)\nexcept ConfigError as error:\n    print(error)"
    )
    assert "run without python -O" in run_python(code, env={"PYTHONOPTIMIZE": "1"}).stdout
