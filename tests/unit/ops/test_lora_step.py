"""The step of several adapters against the step of each one's rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.ops.cases import assert_same, second_derivatives
from veneer.ops import lora_step
from veneer.ops.dropout import Draws
from veneer.ops.lora_linear import lora_linear, lora_linear_reference
from veneer.ops.lora_step import Factors, Part, add_lora_rows_, blocks_of, lora_linear_rows

WIDTH, OUT, SIZE = 64, 20, 80
#: Neighbours of one size, then a gap, then one of another size.
ROWS = [slice(SIZE * i, SIZE * (i + 1)) for i in range(3)] + [slice(3 * SIZE + 4, 3 * SIZE + 9)]
RANKS, SCALINGS = (2, 4, 3, 2), (2.0, 0.7, 1.5, 2.0)


@pytest.fixture(autouse=True)
def blocks_of_every_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks in float32 and float64 too, for what needs their precision."""
    for size in (4, 8):
        monkeypatch.setitem(lora_step._WORTH_A_BLOCK, size, 1_000_000)


def given(dtype: torch.dtype = torch.float32, factor_dtype: torch.dtype | None = None) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*size, generator=draw) * size[-1] ** -0.5).to(dtype).requires_grad_()

    made: dict[str, Any] = {
        "x": normal(3 * SIZE + 9, WIDTH),
        "weight": normal(OUT, WIDTH),
        "bias": normal(OUT),
    }
    for i, r in enumerate(RANKS):
        made[f"A{i}"] = normal(r, WIDTH, dtype=factor_dtype or dtype)
        made[f"B{i}"] = normal(OUT, r, dtype=factor_dtype or dtype)
        made[f"B_bias{i}"] = normal(OUT, dtype=factor_dtype or dtype) if i % 2 else None
    return made


def factors(tensors: dict[str, Any]) -> list[Factors]:
    return [(tensors[f"A{i}"], tensors[f"B{i}"], tensors[f"B_bias{i}"]) for i in range(len(RANKS))]


def parts(p: Sequence[float] = (0.0,) * 4) -> list[Part]:
    """Those of all adapters, with dropout that does not depend on the others'."""
    draws = [Draws(torch.Generator().manual_seed(i), 1, 1) for i in range(len(RANKS))]
    return [Part(s, q, rows, one) for s, q, rows, one in zip(SCALINGS, p, ROWS, draws, strict=True)]


def together(tensors: dict[str, Any], p: Sequence[float] = (0.0,) * 4) -> Tensor:
    return lora_linear_rows(tensors["x"], tensors["weight"], tensors["bias"], parts(p), factors(tensors))


def apart(tensors: dict[str, Any], p: Sequence[float] = (0.0,) * 4) -> Tensor:
    """Each adapter in a step of its own."""
    x, weight, bias = (tensors[name] for name in ("x", "weight", "bias"))
    y = torch.nn.functional.linear(x, weight, bias)
    for part, own in zip(parts(p), factors(tensors), strict=True):
        rows = part._replace(rows=slice(0, part.rows.stop - part.rows.start))
        alone = lora_linear_rows(x[part.rows], weight, bias, [rows], [own])
        index = torch.arange(part.rows.start, part.rows.stop)
        y = y.index_copy(0, index, alone)
    return y


def gradients(y: Tensor, tensors: dict[str, Any]) -> dict[str, Tensor]:
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    wanted = {name: t for name, t in tensors.items() if t is not None and t.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), noise), strict=True))


@pytest.mark.parametrize(
    ("dtype", "factor_dtype"),
    [(torch.float64, None), (torch.float32, None), (torch.bfloat16, torch.float32)],
)
def test_each_part_is_the_step_of_its_rows_alone(
    dtype: torch.dtype, factor_dtype: torch.dtype | None
) -> None:
    tensors = given(dtype, factor_dtype)
    assert [len(block.parts) for block in blocks_of(parts(), factors(tensors), dtype)] == [3, 1]
    y, expected = together(tensors), apart(tensors)
    assert_same({"y": y}, {"y": expected}, dtype)
    assert_same(gradients(y, tensors), gradients(expected, tensors), dtype)


def test_a_part_of_all_rows_is_the_ordinary_step() -> None:
    tensors = given()
    x, weight, bias, (A, B, B_bias) = tensors["x"], tensors["weight"], tensors["bias"], factors(tensors)[1]
    names = {name: tensors[name] for name in ("x", "weight", "bias", "A1", "B1", "B_bias1")}
    y = lora_linear_rows(x, weight, bias, [Part(0.7, 0.0, slice(0, len(x)))], [(A, B, B_bias)])
    expected = lora_linear(x, weight, bias, A, B, B_bias, 0.7, 0.0)
    assert_same({"y": y}, {"y": expected}, torch.float32)
    assert_same(gradients(y, names), gradients(expected, names), torch.float32)


@pytest.mark.parametrize("p", [(0.1,) * 4, (0.1, 0.0, 0.3, 0.2), (0.1, 0.6, 0.0, 0.0)])
def test_dropout_of_a_part_is_what_it_would_be_alone(p: Sequence[float]) -> None:
    """Positions of all, of some, and beside a mask."""
    tensors = given()
    y, expected = together(tensors, p), apart(tensors, p)
    assert_same({"y": y}, {"y": expected}, torch.float32)
    assert_same(gradients(y, tensors), gradients(expected, tensors), torch.float32)


def test_second_derivatives() -> None:
    tensors = given(torch.float64)
    x, weight, bias = (tensors[name] for name in ("x", "weight", "bias"))
    expected = torch.nn.functional.linear(x, weight, bias)
    for part, own in zip(parts(), factors(tensors), strict=True):
        alone = lora_linear_reference(x[part.rows], weight, bias, *own, part.scaling, 0.0)
        expected = expected.index_copy(0, torch.arange(part.rows.start, part.rows.stop), alone)
    assert_same(
        second_derivatives(together(tensors), tensors), second_derivatives(expected, tensors), torch.float64
    )


@pytest.mark.parametrize("inplace", [False, True])
def test_parts_on_the_output_of_another_layer(inplace: bool) -> None:
    tensors = given()
    x, weight, bias = (tensors[name] for name in ("x", "weight", "bias"))
    base = torch.nn.functional.linear(x, weight, bias)
    y = add_lora_rows_(base, x, parts(), factors(tensors), inplace=inplace)
    assert (y is base) == inplace
    assert_same(gradients(y, tensors), gradients(together(tensors), tensors), torch.float32)


@pytest.mark.parametrize("name", ["x", "A1", "B1"])
def test_what_is_not_finite_stays_in_its_part(name: str) -> None:
    tensors, spoilt = given(), given()
    with torch.no_grad():
        (spoilt["x"][ROWS[1]] if name == "x" else spoilt[name]).fill_(torch.nan)
    right, found = together(tensors, (0.1,) * 4), together(spoilt, (0.1,) * 4)
    expected, left = gradients(right, tensors), gradients(found, spoilt)
    others = torch.ones(len(right), dtype=torch.bool)
    others[ROWS[1]] = False
    assert torch.equal(found[others], right[others]) and found[~others].isnan().any()
    for key in (f"{kind}{i}" for kind in "AB" for i in (0, 2, 3)):
        assert torch.equal(left[key], expected[key]), key
    assert torch.equal(left["x"][others], expected["x"][others])


def sizes(ranks: Sequence[int], rows: int, dtype: torch.dtype, width: int = 576) -> list[int]:
    every = [Part(1.0, 0.0, slice(i * rows, (i + 1) * rows)) for i in range(len(ranks))]
    some: list[Factors] = [
        (torch.empty(r, width, device="meta"), torch.empty(width, r, device="meta"), None) for r in ranks
    ]
    return [len(block.parts) for block in blocks_of(every, some, dtype)]


def test_ranks_are_filled_up_as_long_as_that_is_cheap() -> None:
    assert sizes([16] * 8, 4096, torch.float32) == [8], "nothing to fill up"
    assert sizes([4, 8, 64], 64, torch.float32) == [2, 1]
    assert sizes([4, 8, 64], 64, torch.bfloat16) == [2, 1]
    assert sizes([4, 8, 32], 64, torch.bfloat16) == [3], "16-bit products take longer to call"
    assert sizes([4, 8, 32], 4096, torch.bfloat16) == [1, 1, 1]


def test_factors_of_wide_numbers_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert sizes([16] * 3, 64, torch.float32) == [1, 1, 1]
    assert sizes([16] * 3, 64, torch.bfloat16) == [3]


def test_factors_that_are_treated_differently_are_no_block() -> None:
    tensors = given()
    tensors["A1"].requires_grad_(False)
    assert [len(block.parts) for block in blocks_of(parts(), factors(tensors), torch.float32)] == [1, 1, 1, 1]
    y, expected = together(tensors), apart(tensors)
    assert_same(gradients(y, tensors), gradients(expected, tensors), torch.float32)
