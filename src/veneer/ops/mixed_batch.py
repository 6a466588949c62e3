"""Rows of one batch through different adapters.

Two ways to add ``s · (x Aᵀ) Bᵀ`` with the factors of each row's own adapter:

* `by_mask`: the factors of all adapters side by side, ``H = X [A₁; …; A_U]ᵀ``, ``H`` times a mask that holds
  the row's own strength and zeros elsewhere, ``Y + H [B₁ | … | B_U]ᵀ``: three calls for any number of
  adapters, mixed ranks without padding.
* `by_runs`: neighbouring rows of one adapter together, each run with its own two products: no wasted work,
  but some calls a run.

`prefers_mask` says which one is faster. `reference` is the plain twin that tests compare both with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

#: Neighbouring rows with one adapter: (its name or None for the base, first row, row after the last).
Run = tuple[str | None, int, int]
#: The factors of an adapter, A (r, in) and B (out, r), and its strength.
Term = tuple[Tensor, Tensor, float]

#: Multiplications that a run's own calls cost as much time as: an estimate, from some ten microseconds of
#: calls and some ten billion products a second. It decides what is faster, never what is right.
RUN_COST = 400_000


def runs_of(names: Sequence[str | None]) -> list[Run]:
    """Neighbouring equal names together."""
    found: list[Run] = []
    for row, name in enumerate(names):
        if found and found[-1][0] == name:
            found[-1] = (name, found[-1][1], row + 1)
        else:
            found.append((name, row, row + 1))
    return found


def prefers_mask(runs: int, tokens: int, total_rank: int, mean_rank: float, size: int) -> bool:
    """Whether the wasted products of `by_mask` cost less than the calls of `by_runs`.

    Args:
        runs: Number of runs that have an adapter.
        tokens: Rows times positions.
        total_rank: Sum of the ranks of all adapters of the batch.
        mean_rank: Mean rank over the rows.
        size: in + out.
    """
    return tokens * (total_rank - mean_rank) * size <= runs * RUN_COST


def by_mask(x: Tensor, result: Tensor, a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """``result + ((x Aᵀ) · mask) Bᵀ``.

    Args:
        x: (rows, ..., in).
        result: (rows, ..., out), fresh; it is written where no gradient is recorded.
        a: The factors A of all adapters, one below the other: (R, in).
        b: The factors B side by side: (out, R).
        mask: (rows, R): the row's own adapter's strength, else 0.

    Returns:
        (rows, ..., out).
    """
    h = F.linear(x, a.to(x.dtype))
    h = h * mask.to(h.dtype).view(mask.shape[0], *(1,) * (h.dim() - 2), mask.shape[1])
    if torch.is_grad_enabled() or not result.is_contiguous() or result.dtype != h.dtype:
        return result + F.linear(h, b.to(h.dtype)).to(result.dtype)
    result.view(-1, result.shape[-1]).addmm_(h.reshape(-1, h.shape[-1]), b.to(h.dtype).t())
    return result


def by_runs(x: Tensor, result: Tensor, terms: Mapping[str, Term], runs: Sequence[Run]) -> Tensor:
    """``result`` plus each run's own update.

    Args:
        x: (rows, ..., in).
        result: (rows, ..., out), fresh; it is written where no gradient is recorded.
        terms: Factors and strength by adapter.
        runs: Covering all rows in order.

    Returns:
        (rows, ..., out).
    """
    in_place = not torch.is_grad_enabled() and result.is_contiguous()
    parts = []
    for name, start, stop in runs:
        part = result[start:stop]
        if name is not None:
            a, b, scaling = terms[name]
            h = F.linear(x[start:stop], a.to(x.dtype))
            if in_place and h.dtype == part.dtype:
                part.view(-1, part.shape[-1]).addmm_(
                    h.reshape(-1, h.shape[-1]), b.to(h.dtype).t(), alpha=scaling
                )
            else:
                part = part + (F.linear(h, b.to(h.dtype)) * scaling).to(part.dtype)
                if in_place:
                    result[start:stop] = part
        parts.append(part)
    return result if in_place else torch.cat(parts)


def reference(x: Tensor, result: Tensor, terms: Mapping[str, Term], names: Sequence[str | None]) -> Tensor:
    """The plain twin: each row by itself."""
    rows = []
    for row, name in enumerate(names):
        y = result[row]
        if name is not None:
            a, b, scaling = terms[name]
            y = y + scaling * (x[row] @ a.to(x.dtype).t() @ b.to(x.dtype).t())
        rows.append(y)
    return torch.stack(rows)
