"""The ways of a mixed batch against their plain twin."""

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
    a, b = mixed_batch.side_by_side(list(terms.values()), mixed_batch.working_dtype(x))
    owners = [n for n, t in terms.items() for _ in range(t[0].shape[0])]
    mask = torch.tensor([[terms[o][2] * (o == n) for o in owners] for n in NAMES])
    return mixed_batch.by_mask(x, result, a, b, mask)


def by_groups(x: Tensor, result: Tensor, terms: dict[str, mixed_batch.Term]) -> Tensor:
    groups = mixed_batch.groups_of(mixed_batch.runs_of(NAMES))
    a, b, scales = mixed_batch.stacked(
        [None if n is None else terms[n] for n in groups], mixed_batch.working_dtype(x)
    )
    return mixed_batch.by_groups(x, result, a, b, scales)


def by_runs(x: Tensor, result: Tensor, terms: dict[str, mixed_batch.Term]) -> Tensor:
    return mixed_batch.by_runs(x, result, terms, mixed_batch.runs_of(NAMES))


def by_slots(x: Tensor, result: Tensor, terms: dict[str, mixed_batch.Term]) -> Tensor:
    slots = [(a, b, s * torch.tensor([n == name for n in NAMES])) for name, (a, b, s) in terms.items()]
    return mixed_batch.by_slots(x, result, slots)


def twin(x: Tensor, result: Tensor, terms: dict[str, mixed_batch.Term]) -> Tensor:
    """Each row by itself, in plain torch."""
    rows = []
    for row, name in enumerate(NAMES):
        y = result[row]
        if name is not None:
            a, b, scaling = terms[name]
            y = y + scaling * (x[row] @ a.to(x.dtype).t() @ b.to(x.dtype).t())
        rows.append(y)
    return torch.stack(rows)


WAYS = [by_mask, by_groups, by_runs]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("middle", [(), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_the_twin(way: object, dtype: torch.dtype, middle: tuple[int, ...]) -> None:
    x, result, terms = case(dtype, *middle)
    expected = twin(x.double(), result.double(), terms)
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


@pytest.mark.parametrize("way", [*WAYS, by_slots])
def test_gradients_are_the_twins(way: object) -> None:
    x, result, terms = case(torch.float64, 3)
    terms = {n: (a.double(), b.double(), s) for n, (a, b, s) in terms.items()}
    leaves = [x, result, *(t for a, b, _ in terms.values() for t in (a, b))]
    for leaf in leaves:
        leaf.requires_grad_()
    assert callable(way)
    actual = torch.autograd.grad(way(x, result, terms).square().sum(), leaves)
    wanted = torch.autograd.grad(twin(x, result, terms).square().sum(), leaves)
    for mine, expected in zip(actual, wanted, strict=True):
        assert_close(mine, expected)


def test_neighbours_of_one_adapter_are_one_run() -> None:
    assert mixed_batch.runs_of(NAMES) == [
        ("a", 0, 2), (None, 2, 3), ("b", 3, 4), ("a", 4, 5), (None, 5, 7),
    ]  # fmt: skip
    assert mixed_batch.runs_of([]) == []


def test_rows_are_cut_into_the_largest_groups_of_one_size() -> None:
    assert mixed_batch.groups_of(mixed_batch.runs_of(["a", "a", None, None, "b", "b", "b", "b"])) == (
        "a", None, "b", "b",
    )  # fmt: skip
    assert mixed_batch.groups_of(mixed_batch.runs_of(["a"] * 5)) == ("a",)
    assert len(mixed_batch.groups_of(mixed_batch.runs_of(NAMES))) == len(NAMES)


def test_one_batch_of_one_adapter_is_one_group() -> None:
    one = mixed_batch.stacked([(torch.ones(2, 3), torch.ones(4, 2), 0.5)], torch.float32)
    assert [t.shape for t in one] == [(1, 2, 3), (1, 4, 2), (1, 1, 1)]
    assert float(one[2]) == 0.5


@pytest.mark.parametrize("width", [2, 4])
def test_what_is_cheapest_depends_on_the_batch(width: int) -> None:
    def cheapest(runs: int, groups: int, tokens: int, adapters: int, kept: bool) -> str:
        ways = mixed_batch.amounts(runs, groups, tokens, [16] * adapters, 16, 1152, kept)
        return mixed_batch.cheapest(ways, width)

    assert cheapest(8, 8, 8, 8, True) == "groups", "a token of eight adapters"
    assert cheapest(64, 64, 64, 2, True) == "mask", "many rows of two adapters, by turns"
    assert cheapest(2, 64, 64 * 1024, 2, False) == "runs", "much to compute, and two runs of uneven length"
