"""Rows of one batch through different adapters.

Ways to add ``s · (x Aᵀ) Bᵀ`` with the factors of each row's own adapter:

* `by_mask`: the factors of all adapters side by side, ``H = X [A₁; …; A_U]ᵀ``, ``H`` times a mask that holds
  the row's own strength and zeros elsewhere, ``Y + H [B₁ | … | B_U]ᵀ``: three calls for any number of
  adapters, and products that the mask throws away.
* `by_groups`: groups of neighbouring rows, all of one size, each with its own adapter's factors: two batched
  products and no wasted one, but factors are copied once for each group, and smaller ranks are filled up.
* `by_runs`: neighbouring rows of one adapter together, each run with its own two products: nothing is copied
  and nothing wasted, but there are some calls a run.
* `by_slots`: every row through every adapter, one after the other, and times what it counts there: what a
  compiler sees, since nothing but values depends on which row is whose.

`cheapest` says which of the first three is the fastest. `reference` is the plain twin that tests compare all
with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import mul
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.ops.lora_linear import few_rows

#: Neighbouring rows with one adapter: (its name or None for the base, first row, row after the last).
Run = tuple[str | None, int, int]
#: The factors of an adapter, A (r, in) and B (out, r), and its strength.
Term = tuple[Tensor, Tensor, float]


def runs_of(names: Sequence[str | None]) -> list[Run]:
    """Neighbouring equal names together."""
    found: list[Run] = []
    for row, name in enumerate(names):
        if found and found[-1][0] == name:
            found[-1] = (name, found[-1][1], row + 1)
        else:
            found.append((name, row, row + 1))
    return found


def groups_of(runs: Sequence[Run]) -> tuple[str | None, ...]:
    """The adapter of each group: the batch is cut into the largest groups of one size that its runs allow."""
    size = math.gcd(*(stop - start for _, start, stop in runs))
    return tuple(name for name, start, stop in runs for _ in range((stop - start) // size))


def working_dtype(x: Tensor) -> torch.dtype:
    """The type to compute a branch in: few rows of 16 bits on a CPU are dearer than the same in float32."""
    few = few_rows(x)
    return torch.float32 if few and x.dtype in (torch.float16, torch.bfloat16) else x.dtype


class Amounts(NamedTuple):
    """What adding the updates of a mixed batch takes, or what one of each costs in microseconds.

    Args:
        calls: Products, whatever their size.
        products: Millions of multiplications.
        read: Millions of elements of factors.
        copied: Millions of elements of factors that are put side by side or stacked before.
    """

    calls: float
    products: float
    read: float
    copied: float


#: What one of each costs, by the bytes of an element that is computed with: it decides what is faster, never
#: what is right. Measured: ``python -m benchmarks.mixed_batch --fit``.
PRICES = {4: Amounts(9.2, 16.0, 190.0, 390.0), 2: Amounts(34.0, 5.2, 370.0, 350.0)}


def amounts(
    runs: int, groups: int, tokens: int, ranks: Sequence[int], rank: float, size: int, kept: bool
) -> dict[str, Amounts]:
    """What each way takes, by its name: ``"groups"``, ``"mask"`` and ``"runs"``.

    Args:
        runs: Number of runs that have an adapter.
        groups: Number of groups.
        tokens: Rows times positions.
        ranks: Of the adapters of the batch.
        rank: Mean over the rows.
        size: in + out.
        kept: Whether what is copied serves many calls.
    """
    total, largest, each = sum(ranks), max(ranks), size / 1e6
    copies = 0.0 if kept else each
    grouped = groups * largest
    return {
        "groups": Amounts(2, each * tokens * largest, each * grouped, copies * grouped),
        "mask": Amounts(3, each * tokens * total, each * total, copies * total),
        "runs": Amounts(2 * runs, each * tokens * rank, each * runs * largest, 0),
    }


def cheapest(ways: Mapping[str, Amounts], width: int) -> str:
    """The way that takes the least time, for elements of so many bytes."""
    prices = PRICES[min(width, 4)]
    costs = {name: sum(map(mul, found, prices)) for name, found in ways.items()}
    return min(costs, key=costs.__getitem__)


def side_by_side(terms: Sequence[Term], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The factors of all adapters for `by_mask`: A one below the other (R, in), B side by side (out, R)."""
    a = torch.cat([a.to(dtype) for a, _, _ in terms])
    return a, torch.cat([b.to(dtype) for _, b, _ in terms], dim=1)


def stacked(terms: Sequence[Term | None], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The factors of each group for `by_groups`, and their strengths: (G, r, in), (G, out, r) and (G, 1, 1).

    Args:
        terms: Of each group's adapter; None for none, which becomes zeros.
        dtype: To compute in.
    """
    first = next(term for term in terms if term is not None)
    rank = max(term[0].shape[0] for term in terms if term is not None)
    nothing = first[0].new_zeros(rank, first[0].shape[1]), first[1].new_zeros(first[1].shape[0], rank)
    pairs = [nothing if term is None else _padded(*term[:2], rank) for term in terms]
    scales = torch.tensor([0.0 if term is None else term[2] for term in terms], dtype=dtype)
    a, b = (torch.stack([pair[side].to(dtype) for pair in pairs]) for side in (0, 1))
    return a, b, scales.to(a.device).view(-1, 1, 1)


def _padded(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) with zeros up to a larger rank."""
    short = rank - a.shape[0]
    return (F.pad(a, (0, 0, 0, short)), F.pad(b, (0, short))) if short else (a, b)


def by_mask(x: Tensor, result: Tensor, a: Tensor, b: Tensor, mask: Tensor, fresh: bool = True) -> Tensor:
    """``result + ((x Aᵀ) · mask) Bᵀ``.

    Args:
        x: (rows, ..., in).
        result: (rows, ..., out); where it is fresh and no gradient is recorded, it is written.
        a: The factors A of all adapters, one below the other: (R, in).
        b: The factors B side by side: (out, R).
        mask: (rows, R): the row's own adapter's strength, else 0.
        fresh: Whether nobody else holds the result.

    Returns:
        (rows, ..., out).
    """
    h = F.linear(x.to(a.dtype), a)
    h = h * mask.to(h.dtype).view(mask.shape[0], *(1,) * (h.dim() - 2), mask.shape[1])
    return _plus(result, h.flatten(0, -2), b.t(), fresh)


def by_groups(x: Tensor, result: Tensor, a: Tensor, b: Tensor, scales: Tensor, fresh: bool = True) -> Tensor:
    """``result`` plus each group's own update.

    Args:
        x: (rows, ..., in), the rows being those of the first group, of the second, ….
        result: (rows, ..., out); where it is fresh and no gradient is recorded, it is written.
        a: (G, r, in) of `stacked`.
        b: (G, out, r) of `stacked`.
        scales: (G, 1, 1) of `stacked`.
        fresh: Whether nobody else holds the result.

    Returns:
        (rows, ..., out).
    """
    tokens = math.prod(x.shape[:-1]) // len(a)
    h = torch.bmm(x.reshape(len(a), tokens, x.shape[-1]).to(a.dtype), a.transpose(1, 2)) * scales
    return _plus(result, h, b.transpose(1, 2), fresh)


def by_runs(
    x: Tensor, result: Tensor, terms: Mapping[str, Term], runs: Sequence[Run], fresh: bool = True
) -> Tensor:
    """``result`` plus each run's own update.

    Args:
        x: (rows, ..., in).
        result: (rows, ..., out); where it is fresh and no gradient is recorded, it is written.
        terms: Factors and strength by adapter.
        runs: Covering all rows in order.
        fresh: Whether nobody else holds the result.

    Returns:
        (rows, ..., out).
    """
    in_place = fresh and not torch.is_grad_enabled() and result.is_contiguous()
    dtype = working_dtype(x)
    x, parts = x.to(dtype), []
    for name, start, stop in runs:
        part = result[start:stop]
        if name is not None:
            a, b, scaling = terms[name]
            h = F.linear(x[start:stop], a.to(dtype)).flatten(0, -2)
            part = _plus(part, h, b.to(dtype).t(), in_place, scaling)
        parts.append(part)
    return result if in_place else torch.cat(parts)


def by_slots(x: Tensor, result: Tensor, slots: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """``result + Σ ((x Aᵀ) · w) Bᵀ`` over all slots.

    Args:
        x: (rows, ..., in).
        result: (rows, ..., out); not written.
        slots: A (r, in), B (out, r) and the rows' weights w (rows,), the strength or 0.

    Returns:
        (rows, ..., out).
    """
    for a, b, weights in slots:
        h = F.linear(x, a.to(x.dtype))
        h = h * weights.to(h.dtype).view(-1, *(1,) * (h.dim() - 1))
        result = result + F.linear(h, b.to(h.dtype)).to(result.dtype)
    return result


def _plus(result: Tensor, h: Tensor, b: Tensor, fresh: bool, scaling: float = 1.0) -> Tensor:
    """``result + s · h b``; h: (n, r) or (G, n, r), b: (r, out) or (G, r, out)."""
    if torch.is_grad_enabled() or not fresh or not result.is_contiguous():
        update = torch.matmul(h, b)
        update = update if scaling == 1.0 else update * scaling
        return result + update.view(result.shape).to(result.dtype)
    flat = result.view(*h.shape[:-1], result.shape[-1])
    if result.dtype != h.dtype:
        flat.add_(torch.matmul(h, b), alpha=scaling)
    elif h.dim() == 2:
        flat.addmm_(h, b, alpha=scaling)
    else:
        flat.baddbmm_(h, b, alpha=scaling)
    return result
