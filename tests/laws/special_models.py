"""Models whose adapters replace a whole module: attention, bare parameters, rows of an embedding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.laws.cases import ScaledEmbedding

VOCABULARY = 13


class Attending(nn.Module):
    """An attention over itself and over something else."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.attn = nn.MultiheadAttention(8, 2, **options)
        self.cross = nn.MultiheadAttention(8, 2, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (5, 3) -> (5, 3, 3)."""
        x = self.embed(ids)
        mask = torch.ones(x.shape[:2], dtype=torch.bool).triu(1)[: x.shape[0], : x.shape[0]]
        mask = mask if mask.shape[0] == mask.shape[1] else None
        y, _ = self.attn(x, x, x, attn_mask=mask, need_weights=False)
        z, weights = self.cross(y, x.flip(0), x)
        return self.head(y + z * weights.sum())


class Experts(nn.Module):
    """Two stacks of matrices, used expert by expert or all at once, and a vector that nothing adapts."""

    def __init__(self, count: int = 3, size: int = 8, inner: int = 6, turned: bool = False) -> None:
        super().__init__()
        self.is_transposed = turned
        shapes = ((count, size, inner), (count, inner, size))
        up, down = shapes if turned else (shapes[1], shapes[0])
        self.up = nn.Parameter(torch.randn(up) * 0.3)
        self.scale = nn.Parameter(torch.ones(inner))
        self.down = nn.Parameter(torch.randn(down) * 0.3)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        """x: (n, size), chosen: (n,) -> (n, size)."""
        if self.is_transposed:
            hidden = torch.bmm(x.expand(len(self.up), *x.shape), self.up) * self.scale
            every = torch.bmm(hidden.relu(), self.down)
            return every[chosen, torch.arange(len(x))]
        result = torch.zeros_like(x)
        for expert in range(len(self.up)):
            mine = chosen == expert
            hidden = nn.functional.linear(x[mine], self.up[expert]) * self.scale
            result[mine] = nn.functional.linear(hidden.relu(), self.down[expert]).to(result.dtype)
        return result


class Mixture(nn.Module):
    """Experts behind a router, a bare matrix, and an ordinary linear."""

    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.router = nn.Linear(8, 3)
        self.experts = Experts(turned=turned)
        self.last = Matrix()
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (5, 3) -> (15, 3)."""
        x = self.embed(ids).flatten(0, -2)
        return self.head(self.last(self.experts(x, self.router(x).argmax(-1))))


class Matrix(nn.Module):
    """A matrix that is used in a way that has no product to adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 8) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., 8) -> (..., 8)."""
        return torch.einsum("...i,oi->...o", x, self.table)


class Tied(nn.Module):
    """An embedding, and perhaps a head with the same weight."""

    def __init__(self, tied: bool = True, *, scale: float | None = None) -> None:
        super().__init__()
        self.embed = (
            ScaledEmbedding(VOCABULARY, 8, scale=scale)
            if scale
            else nn.Embedding(VOCABULARY, 8, padding_idx=2)
        )
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, VOCABULARY)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (5, 3) -> (5, 3, vocabulary)."""
        return self.head(self.body(self.embed(ids)).tanh())


@dataclass(frozen=True)
class Special:
    """A model, and what it is adapted with."""

    build: Callable[[], nn.Module]
    options: Mapping[str, Any] = field(default_factory=dict)
    #: What a second adapter has otherwise: two cannot train the same rows.
    second: Mapping[str, Any] = field(default_factory=dict)
    x: Callable[[], Tensor] = lambda: torch.arange(15).view(5, 3) % VOCABULARY


def _tokens(module: str, *indices: int) -> dict[str, Any]:
    return {"target_modules": ["body"], "trainable_token_indices": {module: list(indices)}}


SPECIAL: dict[str, Special] = {
    "attention": Special(Attending, {"target_modules": ["attn", "cross", "head"]}),
    "attention-batch-first": Special(partial(Attending, batch_first=True), {"target_modules": ["attn"]}),
    "attention-added-bias": Special(
        partial(Attending, add_bias_kv=True, add_zero_attn=True), {"target_modules": ["attn", "cross"]}
    ),
    "parameters": Special(
        Mixture,
        {"target_modules": ["head"], "target_parameters": ["experts.up", "experts.down", "last.table"]},
    ),
    "parameters-turned": Special(
        partial(Mixture, turned=True), {"target_modules": [], "target_parameters": ["down", "up"]}
    ),
    "one-parameter": Special(Mixture, {"target_modules": ["head"], "target_parameters": ["experts.down"]}),
    "weight-of-a-linear": Special(Mixture, {"target_modules": [], "target_parameters": ["head.weight"]}),
    "tokens": Special(partial(Tied, False), _tokens("embed", 9, 3, 5), _tokens("embed", 4, 1)),
    "tokens-tied": Special(Tied, _tokens("embed", 9, 3, 5, 12), _tokens("embed", 4, 1)),
    "tokens-of-a-head": Special(partial(Tied, False), _tokens("head", 9, 3), _tokens("head", 4)),
    "tokens-of-a-scaled-embedding": Special(
        partial(Tied, scale=3.0), _tokens("embed", 9, 3), _tokens("embed", 4, 1)
    ),
}
