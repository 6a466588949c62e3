"""Tokens are followed as long as they stay in order, and never further."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.ops.token_rows import LOST, TokenRows, Tokens

ROWS, TOKENS, SIZE = 2, 3, 4
WEIGHT = torch.randn(5, SIZE)
TURNED = torch.tensor([5, 4, 3, 2, 1, 0])

KEPT: dict[str, Callable[[Tensor], object]] = {
    "linear": lambda x: F.linear(x, WEIGHT),
    "product": lambda x: x @ WEIGHT.t(),
    "gate": lambda x: F.silu(x.chunk(2, dim=-1)[0]) * x[..., 2:],
    "every other": lambda x: x[..., ::2].clamp(max=1.0) + x[:, 1::2],
    "norm": lambda x: x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6).type_as(x),
    "layer norm": lambda x: F.layer_norm(x, (SIZE,)),
    "written to": lambda x: x.clone().mul_(2.0).add_(x),
    "chosen experts": lambda x: torch.topk(F.softmax(x, dim=-1), 2, dim=-1)[1],
    "groups": lambda x: x.view(-1, 2, 2).topk(1, dim=-1)[0].sum(dim=-1),
    "mask": lambda x: torch.zeros_like(x).scatter_(1, x.argmax(-1).unsqueeze(-1), 1.0).bool(),
    "same shape": lambda x: x.reshape(-1, SIZE),
}
NOT_KEPT: dict[str, Callable[[Tensor], object]] = {
    "gathered": lambda x: x[TURNED],
    "selected": lambda x: x.index_select(0, TURNED),
    "each repeated": lambda x: x.repeat_interleave(2, 0),
    "sorted": lambda x: x.sort(0)[0],
    "turned": lambda x: x.flip(0),
    "normalised over tokens": lambda x: F.softmax(x, dim=0),
    "transposed": lambda x: x.t(),
    "mixed": lambda x: torch.randn(6, 6) @ x,
    "added up": lambda x: torch.zeros_like(x).index_add_(0, TURNED, x),
    "combined with what is lost": lambda x: x + x[TURNED],
    "of a lost one": lambda x: F.silu(F.linear(x[TURNED], WEIGHT)),
    "broadcast": lambda x: x[:, :1].squeeze(1) + torch.zeros(6, 6),
    "half of them": lambda x: x.view(3, -1),
    "flattened the other way": lambda x: x.reshape(-1, 1),
    "turned twice after repeating": lambda x: x.repeat(2, 1).t().reshape(-1, 1),
    "some of the repeated": lambda x: x.repeat(2, 1)[: ROWS * TOKENS],
    "repeated and not": lambda x: x.repeat(2, 1) + torch.zeros_like(x).repeat(2, 1)[TURNED.repeat(2)],
}
REPEATED: dict[str, Callable[[Tensor], object]] = {
    "in order": lambda x: x.repeat(SIZE, 1),
    "twice": lambda x: F.silu(x.repeat(2, 1)).repeat((2, 1)),
    "its scores": lambda x: torch.sigmoid(x).transpose(0, 1).reshape(-1, 1),
    "scaled by its scores": lambda x: x.repeat(SIZE, 1) * x.t().contiguous().view(-1, 1),
}


def followed(function: Callable[[Tensor], object], *, inference: bool = False) -> Tokens | None:
    with torch.inference_mode(inference), TokenRows({ROWS}) as tokens:
        result = function(torch.randn(ROWS, TOKENS, SIZE).view(-1, SIZE))
        assert isinstance(result, Tensor)
        return tokens.of(result)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", KEPT)
def test_operations_on_each_token_keep_them(name: str, inference: bool) -> None:
    assert followed(KEPT[name], inference=inference) == Tokens(TOKENS)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", REPEATED)
def test_tokens_that_are_repeated_in_order_are_followed(name: str, inference: bool) -> None:
    assert followed(REPEATED[name], inference=inference) == Tokens(TOKENS, copies=SIZE)


def test_what_the_rows_have_is_laid_along_their_tokens() -> None:
    assert Tokens(2, copies=2).along("ab") == tuple("aabbaabb")
    x = torch.arange(ROWS).view(ROWS, 1, 1).expand(ROWS, TOKENS, SIZE).reshape(-1, SIZE)
    for repeat in REPEATED.values():
        order = Tokens(TOKENS, copies=SIZE).along(range(ROWS))
        sizes = repeat(x.float())
        assert isinstance(sizes, Tensor)
        assert torch.equal(sizes[:, 0].argsort(stable=True), torch.tensor(order).argsort(stable=True))


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", NOT_KEPT)
def test_whatever_may_move_tokens_loses_them(name: str, inference: bool) -> None:
    assert followed(NOT_KEPT[name], inference=inference) == LOST


def test_only_an_axis_of_rows_is_followed() -> None:
    with TokenRows({ROWS}) as tokens:
        assert tokens.of(torch.randn(3, 2, SIZE).view(-1, SIZE)) is None
        assert tokens.of(torch.randn(ROWS, TOKENS, SIZE).view(-1, 2 * SIZE)) is None
        with tokens.among(3):
            assert tokens.of(torch.randn(3, 2, SIZE).view(-1, SIZE)) == Tokens(2)
        back = torch.randn(ROWS, TOKENS, SIZE).view(-1, SIZE)[TURNED].view(ROWS, TOKENS, SIZE)
        assert tokens.of(back) is None


def test_what_was_written_to_behind_its_back_is_lost() -> None:
    with TokenRows({ROWS}) as tokens:
        x = torch.randn(ROWS, TOKENS, SIZE).view(-1, SIZE)
        x.t()[:] = x.flip(0).t()
        assert tokens.of(x) == LOST
        y = torch.randn(ROWS, TOKENS, SIZE).view(-1, SIZE)
        y[TURNED] = 1.0
        assert tokens.of(y) == LOST


def test_notes_go_with_their_tensors() -> None:
    with TokenRows({ROWS}) as tokens:
        x = torch.randn(ROWS, TOKENS, SIZE).view(-1, SIZE)
        assert tokens.of(F.silu(x)) == Tokens(TOKENS)
        del x
        gc.collect()
        assert not tokens._notes
