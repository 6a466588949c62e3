"""Both ways of a mixed batch against their plain twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.tolerances import assert_close
from veneer.ops import mixed_batch

NAMES = ["a", "a", None, "b", "a", None, None]


def case(dtype: torch.dtype, *middle: int) -> tuple[Tensor, Tensor, dict[str, mixed_batch.Term]]:
    torch.manual_seed(0)
    x, result = torch.randn(7, *middle, 6), torch.randn(7, *middle, 5)
    terms = {n: (torch.randn(r, 6), torch.randn(5, r), s) for n, r, s in (("a", 2, 0.5), ("b", 3, -2.0))}
    return x.to(dtype), result.to(dtype), terms


def by_mask(x: Tensor, result: Tensor, terms: dict[str, mixed_batch.Term]) -> Tensor:
    a = torch.cat([t[0] for t in terms.values()])
    b = torch.cat([t[1] for t in terms.values()], dim=1)
    owners = [n for n, t in terms.items() for _ in range(t[0].shape[0])]
    mask = torch.tensor([[terms[o][2] * (o == n) for o in owners] for n in NAMES])
    return mixed_batch.by_mask(x, result, a, b, mask)


def by_runs(x: Tensor, result: Tensor, terms: dict[str, mixed_batch.Term]) -> Tensor:
    return mixed_batch.by_runs(x, result, terms, mixed_batch.runs_of(NAMES))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("middle", [(), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("way", [by_mask, by_runs])
def test_both_ways_are_the_twin(way: object, dtype: torch.dtype, middle: tuple[int, ...]) -> None:
    x, result, terms = case(dtype, *middle)
    expected = mixed_batch.reference(x.double(), result.double(), terms, NAMES)
    assert callable(way)
    assert_close(way(x, result.clone(), terms).double(), expected, assert_close_as(dtype))
    with torch.no_grad():
        written = result.clone()
        answer = way(x, written, terms)
        assert answer is written
        assert_close(answer.double(), expected, assert_close_as(dtype))
        apart = result.clone().transpose(0, -1).contiguous().transpose(0, -1)
        assert_close(way(x, apart, terms).double(), expected, assert_close_as(dtype))


def assert_close_as(dtype: torch.dtype) -> object:
    from tests.tolerances import BY_DTYPE

    tolerance = BY_DTYPE[dtype]
    return tolerance._replace(atol=tolerance.atol * 8)


@pytest.mark.parametrize("way", [by_mask, by_runs])
def test_gradients_are_the_twins(way: object) -> None:
    x, result, terms = case(torch.float64, 3)
    terms = {n: (a.double(), b.double(), s) for n, (a, b, s) in terms.items()}
    leaves = [x, result, *(t for a, b, _ in terms.values() for t in (a, b))]
    for leaf in leaves:
        leaf.requires_grad_()
    assert callable(way)
    actual = torch.autograd.grad(way(x, result, terms).square().sum(), leaves)
    twin = mixed_batch.reference(x, result, terms, NAMES)
    for mine, expected in zip(actual, torch.autograd.grad(twin.square().sum(), leaves), strict=True):
        assert_close(mine, expected)


def test_neighbours_of_one_adapter_are_one_run() -> None:
    assert mixed_batch.runs_of(NAMES) == [
        ("a", 0, 2), (None, 2, 3), ("b", 3, 4), ("a", 4, 5), (None, 5, 7),
    ]  # fmt: skip
    assert mixed_batch.runs_of([]) == []


def test_few_tokens_prefer_the_mask_and_many_the_runs() -> None:
    assert mixed_batch.prefers_mask(8, 8, 128, 16, 1152)
    assert not mixed_batch.prefers_mask(8, 8 * 2048, 128, 16, 1152)
    assert mixed_batch.prefers_mask(1, 10**9, 16, 16, 1152), "one adapter wastes nothing"
