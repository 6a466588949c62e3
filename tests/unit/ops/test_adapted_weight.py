"""A weight with low-rank terms: every product is that of the sum, and only others make it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.tolerances import assert_close
from veneer.ops.adapted_weight import AdaptedWeight

COUNT, ROWS, COLUMNS, RANK = 4, 16, 24, 3


def stack(dtype: torch.dtype = torch.float32) -> tuple[AdaptedWeight, Tensor]:
    """A stack of matrices with two terms, and the sum."""
    weight = torch.randn(COUNT, ROWS, COLUMNS, dtype=dtype)
    terms = [
        (torch.randn(COUNT, ROWS, r, dtype=dtype), torch.randn(COUNT, r, COLUMNS, dtype=dtype), s)
        for r, s in ((RANK, 0.5), (8, -2.0))
    ]
    return AdaptedWeight(weight, terms), weight + sum(s * (a @ b) for a, b, s in terms)


class Counting(AdaptedWeight):
    """One that notes how often the sum is made."""

    made = 0

    def dense(self) -> Tensor:
        Counting.made += 1
        return super().dense()

    def map(self, change: Callable[[Tensor], Tensor]) -> AdaptedWeight:
        other = super().map(change)
        return Counting(other.weight, other.terms)

    def turned(self) -> AdaptedWeight:
        other = super().turned()
        return Counting(other.weight, other.terms)


OFFSETS = torch.tensor([2, 5, 5, 10], dtype=torch.int32)

PRODUCTS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear of an expert": lambda w: F.linear(torch.ones(2, COLUMNS, dtype=w.dtype), w[1]),
    "linear with a bias": lambda w: F.linear(torch.ones(2, COLUMNS, dtype=w.dtype), w[0], torch.ones(ROWS)),
    "by a tensor's index": lambda w: torch.ones(2, ROWS) @ w[torch.tensor(2)],
    "several experts": lambda w: torch.bmm(w[torch.tensor([0, 1, 1])], torch.ones(3, COLUMNS, 1)),
    "bmm": lambda w: torch.bmm(torch.ones(COUNT, 5, ROWS), w),
    "matmul from the left": lambda w: w @ torch.ones(COLUMNS, 2),
    "transposed": lambda w: torch.ones(2, COLUMNS) @ w[3].T,
    "grouped": lambda w: F.grouped_mm(torch.ones(10, ROWS), w, offs=OFFSETS),
    "grouped and transposed": lambda w: F.grouped_mm(
        torch.ones(10, COLUMNS), w.transpose(-2, -1), offs=OFFSETS
    ),
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "einsum": lambda w: torch.einsum("emn,n->em", w, torch.ones(COLUMNS)),
    "a sum": lambda w: w.sum(0),
    "an element": lambda w: w[1, 2],
    "another transpose": lambda w: w.transpose(0, 1),
    "arithmetic": lambda w: torch.add(w, 1.0),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_do_not_make_the_sum(name: str) -> None:
    weight, total = stack()
    Counting.made = 0
    actual = PRODUCTS[name](Counting(weight.weight, weight.terms))  # type: ignore[arg-type]
    assert Counting.made == 0
    assert_close(actual, PRODUCTS[name](total))


@pytest.mark.parametrize("name", OTHERS)
def test_everything_else_gets_the_sum(name: str) -> None:
    weight, total = stack()
    assert_close(OTHERS[name](weight), OTHERS[name](total))  # type: ignore[arg-type]


def test_gradients_reach_the_terms_only() -> None:
    weight, _ = stack()
    for lhs, rhs, _ in weight.terms:
        lhs.requires_grad_()
        rhs.requires_grad_()
    F.grouped_mm(torch.ones(10, ROWS), weight, offs=OFFSETS).square().sum().backward()  # type: ignore[arg-type]
    twin = AdaptedWeight(
        weight.weight, [(a.detach().requires_grad_(), b.detach(), s) for a, b, s in weight.terms]
    )
    dense = twin.dense()
    ends = [0, *OFFSETS.tolist()]
    pairs = list(itertools.pairwise(ends))
    out = torch.cat([torch.ones(b - a, ROWS) @ dense[i] for i, (a, b) in enumerate(pairs)])
    out.square().sum().backward()
    assert weight.weight.grad is None
    for (lhs, rhs, _), (other, _, _) in zip(weight.terms, twin.terms, strict=True):
        assert rhs.grad is not None and rhs.grad.any()
        assert_close(lhs.grad, other.grad)
