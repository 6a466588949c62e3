"""One scale for all: for any ranks and strengths the update stays, exactly or up to one rounding."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.errors import ExportError
from veneer.integrations.export.folding import Rules, fold
from veneer.integrations.export.source import Update
from veneer.integrations.export.verifying import compare

RULES = [
    Rules(alpha, one_rank, rslora)
    for alpha in ("integer", "float32", "any", "rank")
    for one_rank in (True, False)
    for rslora in (True, False)
    if one_rank or not (rslora or alpha == "rank")
]
Dtype = Literal["float32", "float16", "bfloat16"]


def update(r: int, alpha: float, rslora: bool = False, dtype: torch.dtype = torch.float32) -> Update:
    scaling = alpha / (math.sqrt(r) if rslora else r)
    return Update(torch.randn(r, 5).to(dtype), torch.randn(4, r).to(dtype), scaling)


@settings(max_examples=150)
@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.one_of(st.integers(1, 64), st.floats(0.01, 100))),
        min_size=1,
        max_size=5,
    ),
    st.booleans(),
    st.sampled_from(RULES),
    st.sampled_from(["float32", "float16", "bfloat16"]),
)
def test_every_update_stays(
    modules: list[tuple[int, float]], rslora: bool, rules: Rules, dtype: Dtype
) -> None:
    kind = getattr(torch, dtype)
    updates = {str(n): update(r, alpha, rslora, kind) for n, (r, alpha) in enumerate(modules)}
    folded = fold(updates, rules)
    compared = compare(updates, folded.updates)
    for path, new in folded.updates.items():
        # As the reader scales, from what is written in its configuration.
        r = folded.r if rules.one_rank else new.r
        assert new.r == r and new.b.shape[1] == r
        scaling = folded.alpha / (math.sqrt(r) if folded.use_rslora else r)
        assert math.isclose(new.scaling, scaling, rel_tol=1e-14)
        assert compared[path].exact or path in folded.scaled
        assert new.b.dtype == kind
    if rules.alpha == "integer":
        assert type(folded.alpha) is int
    if rules.alpha == "rank":
        assert folded.alpha == folded.r and not folded.use_rslora
    assert rules.rslora or not folded.use_rslora
    assert len(folded.scaled) < len(updates) or rules.alpha in ("integer", "float32", "rank")


def test_what_most_modules_have_stays_as_it_is() -> None:
    updates = {str(n): update(4, alpha) for n, alpha in enumerate((6, 6, 10, 6, 8))}
    folded = fold(updates, Rules("integer"))
    assert folded.alpha == 6 and folded.scaled == ("2", "4") and folded.padded == ()
    for path in "013":
        assert torch.equal(folded.updates[path].b, updates[path].b)


def test_a_strength_that_is_no_whole_number_is_folded_away() -> None:
    updates = {"a": update(4, 6.5)}
    assert (fold(updates, Rules("integer")).alpha, fold(updates, Rules("any")).alpha) == (4, 6.5)
    assert fold(updates, Rules("float32")).alpha == 6.5
    assert fold({"a": update(4, 0.1)}, Rules("float32")).alpha == 4
    rooted = {"a": update(5, 7, rslora=True)}
    assert fold(rooted, Rules("integer", rslora=True)).use_rslora
    assert not fold(rooted, Rules("integer")).use_rslora


def test_biases_of_b_are_scaled_along() -> None:
    one = Update(torch.randn(2, 3), torch.randn(4, 2), 0.5, bias=torch.randn(4))
    folded = fold({"a": one}, Rules("rank")).updates["a"]
    assert folded.bias is not None and one.bias is not None
    assert torch.equal(folded.bias, one.bias * 0.5) and folded.scaling == 1.0


def test_convolutions_are_padded_in_their_rank() -> None:
    wide = Update(torch.randn(4, 2, 3, 3), torch.randn(5, 4, 1, 1), 1.0)
    thin = Update(torch.randn(2, 2, 3, 3), torch.randn(5, 2, 1, 1), 1.0)
    folded = fold({"wide": wide, "thin": thin}, Rules("rank"))
    assert folded.updates["thin"].a.shape == wide.a.shape and folded.updates["thin"].b.shape == wide.b.shape
    assert all(found.exact for found in compare({"wide": wide, "thin": thin}, folded.updates).values())


def test_overflow_names_the_modules() -> None:
    one = Update(torch.ones(1, 2), torch.full((2, 1), 6e4, dtype=torch.float16), 4.0)
    with pytest.raises(ExportError, match=r"1 modules do not fit.*here"):
        fold({"here": one}, Rules("rank"))
    with pytest.raises(ExportError, match="float16"):
        fold({"here": Update(torch.ones(1, 2), torch.full((2, 1), 1e6), 1.0)}, Rules(), torch.float16)
