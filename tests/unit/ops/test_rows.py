"""Rows of their own are written in place as plain torch would compute them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.tolerances import assert_close
from veneer.ops.rows import add_to_rows_, scale_rows_, scaled

ROWS = (slice(0, 2), slice(3, 4))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def output(kind: str) -> Tensor:
    """(5, 3, 2), made from a leaf; what made it does not keep it."""
    leaf = random(5, 3, 2).requires_grad_()
    return leaf if kind == "leaf" else leaf * 2.0 if kind == "fresh" else (leaf * 2.0).transpose(1, 2)


@pytest.mark.parametrize("kind", ["fresh", "leaf", "strided"])
def test_parts_are_added_to_their_rows(kind: str) -> None:
    y = output(kind)
    parts = [random(*y[own].shape, seed=i).requires_grad_() for i, own in enumerate(ROWS, 1)]
    expected = y.clone()
    for own, part, scale in zip(ROWS, parts, (1.0, 0.5), strict=True):
        expected = torch.cat([expected[: own.start], expected[own] + scale * part, expected[own.stop :]])
    outward = random(*y.shape, seed=9)
    right = torch.autograd.grad(expected, [y, *parts], outward)
    found = add_to_rows_(y.clone(), [(ROWS[0], parts[0], 1.0), (ROWS[1], parts[1], 0.5)], inplace=True)
    assert_close(found, expected)
    if kind == "fresh":
        same = y.detach().clone()
        assert add_to_rows_(same, [(ROWS[0], parts[0].detach(), 1.0)], inplace=True) is same
    before = y.detach().clone()
    other = add_to_rows_(y, [(ROWS[0], parts[0], 1.0), (ROWS[1], parts[1], 0.5)])
    assert torch.equal(y, before) and torch.equal(other, found)
    for mine, theirs in zip(torch.autograd.grad(other, [y, *parts], outward), right, strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_rows_are_scaled_and_the_bias_is_not(inplace: bool, biased: bool) -> None:
    leaf = random(5, 3, 2).requires_grad_()
    scales = [random(3, 1, seed=i).requires_grad_() for i in (1, 2)]
    bias = random(3, 1, seed=3).requires_grad_() if biased else None
    leaves = [leaf, *scales, *([] if bias is None else [bias])]
    y = leaf * 2.0
    first, last = (scaled(y[own], scale, bias) for own, scale in zip(ROWS, scales, strict=True))
    expected = torch.cat([first, y[2:3], last, y[4:]])
    outward = random(5, 3, 2, seed=9)
    right = torch.autograd.grad(expected, leaves, outward)
    found = scale_rows_(leaf * 2.0, list(zip(ROWS, scales, strict=True)), bias, inplace=inplace)
    assert torch.equal(found, expected)
    for mine, theirs in zip(torch.autograd.grad(found, leaves, outward), right, strict=True):
        assert_close(mine, theirs)


def test_what_is_scaled_in_place_cannot_be_differentiated_again() -> None:
    """It would be wrong silently: what was there before is no longer a part of the graph."""
    leaf, scale = random(2, 3).requires_grad_(), random(3, seed=1).requires_grad_()
    total = scale_rows_(leaf * leaf, [(slice(0, 1), scale)], None).sum()
    with pytest.raises(RuntimeError, match="create_graph=True: DoRA's step"):
        torch.autograd.grad(total, scale, create_graph=True)
