"""The ways of a mixed batch against their plain twin."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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


def groups_in(
    layout: mixed_batch.Layout, x: Tensor, terms: dict[str, mixed_batch.Term]
) -> Callable[..., Tensor]:
    a, b, scales = mixed_batch.stacked(
        [None if n is None else terms[n] for n in layout.groups], mixed_batch.working_dtype(x)
    )
    return partial(mixed_batch.by_groups, a=a, b=b, scales=scales)


def by_groups(x: Tensor, result: Tensor, terms: dict[str, mixed_batch.Term]) -> Tensor:
    return groups_in(mixed_batch.layouts(NAMES)[0], x, terms)(x, result)


def by_runs(x: Tensor, result: Tensor, terms: dict[str, mixed_batch.Term]) -> Tensor:
    return mixed_batch.by_runs(x, result, terms, mixed_batch.layouts(NAMES)[0].runs)


def runs_together(x: Tensor, result: Tensor, terms: dict[str, mixed_batch.Term]) -> Tensor:
    layout = mixed_batch.layouts(NAMES)[1]
    way = partial(mixed_batch.by_runs, terms=terms, runs=layout.runs)
    return mixed_batch.on_gathered_rows(x, result, way, torch.tensor(layout.order))


def groups_together(x: Tensor, result: Tensor, terms: dict[str, mixed_batch.Term]) -> Tensor:
    layout = mixed_batch.layouts(NAMES)[1]
    return mixed_batch.on_gathered_rows(x, result, groups_in(layout, x, terms), torch.tensor(layout.order))


def by_slots(x: Tensor, result: Tensor, terms: dict[str, mixed_batch.Term]) -> Tensor:
    slots = [(*term, torch.tensor([n == name for n in NAMES])) for name, term in terms.items()]
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


WAYS = [by_groups, by_runs, groups_together, runs_together]


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


#: What a row, a factor or the gradient of a row may hold that spreads.
SPREADING = [float("nan"), float("inf"), -3.0e38]


@pytest.mark.parametrize("value", SPREADING)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("way", [*WAYS, by_slots])
def test_one_adapters_values_change_no_bit_of_anothers(way: object, grad: bool, value: float) -> None:
    assert callable(way)
    mine, others = [row for row, n in enumerate(NAMES) if n == "b"], [0, 1, 2, 4, 5, 6]

    def computed(spoilt: str) -> list[Tensor]:
        x, result, terms = case(torch.float32, 3)
        outward = torch.ones(7, 3, 5)
        for name, tensor in {"x": x, "gradient": outward}.items():
            if name in spoilt:
                tensor[mine] = value
        for number, name in enumerate(("A", "B")):
            if name in spoilt:
                terms["b"][number][:] = value
        leaves = [x, result, *terms["a"][:2]]
        if not grad:
            with torch.no_grad():
                return [way(x, result.clone(), terms)[others]]
        for leaf in (*leaves, *terms["b"][:2]):
            leaf.requires_grad_()
        y = way(x, result, terms)
        dx, dresult, *factors = torch.autograd.grad(y, leaves, outward)
        return [y[others].detach(), dx[others], dresult[others], *factors]

    expected = computed("")
    for spoilt in ("x", "A", "B", "gradient", "x A B gradient"):
        for actual, tensor in zip(computed(spoilt), expected, strict=True):
            assert torch.equal(actual.view(torch.int32), tensor.view(torch.int32)), spoilt


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


def test_scattered_rows_of_one_adapter_are_laid_together() -> None:
    as_they_come, together = mixed_batch.layouts(NAMES)
    assert as_they_come.order is None and len(as_they_come.runs) == 5
    assert together.order == (0, 1, 4, 3), "rows without an adapter are left where they are"
    assert together.runs == [("a", 0, 3), ("b", 3, 4)]
    for names in (["a", "a", None, "b"], ["a"], [None, "b"]):
        assert len(mixed_batch.layouts(names)) == 1, "nothing is gained"


def test_what_is_copied_counts_where_calls_take_less_time() -> None:
    terms = [(torch.ones(r, 3), torch.ones(4, r), 1.0) for r in (2, 5)]
    assert mixed_batch.copied(torch.ones(2, 3), terms) == 5 * 7
    assert mixed_batch.copied(torch.ones(2, 3, dtype=torch.bfloat16), terms) == 0
    assert mixed_batch.copied(torch.ones(2, 3, device="meta"), terms) == 0


def test_few_rows_are_laid_together_and_uneven_runs_are_computed_one_by_one() -> None:
    def chosen(names: list[str | None], few: bool, size: int = 0) -> tuple[bool, str]:
        layout, way = mixed_batch.choose_layout(mixed_batch.layouts(names), few, size)
        return layout.order is not None, way

    eight = [str(row) for row in range(8)]
    for few in (True, False):
        assert chosen(eight, few) == (False, "groups")
        assert chosen(["a"] * 21 + ["b"] * 43, few) == (False, "runs"), "two runs of uneven length"
    assert chosen(eight, False, 16 * 128) == (False, "groups")
    assert chosen(eight, False, 64 * 2112) == (False, "runs"), "copying factors would cost more"
    assert chosen(eight, True, 64 * 2112) == (False, "groups"), "they are copied once for all tokens"
    assert chosen(["a", "b"] * 16, True) == (True, "groups")
    assert chosen(["a", "b"] * 16, False) == (False, "groups"), "copying rows would cost more"
