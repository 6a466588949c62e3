"""Rows of one batch through different adapters.

Ways to add ``s · (x Aᵀ) Bᵀ`` with the factors of each row's own adapter. In none of them does a row meet the
factors or the values of another one, so that an infinity stays where it is:

* `by_groups`: groups of neighbouring rows, all of one size, each with its own adapter's factors: two batched
  products and no wasted one, but factors are copied once for each group, and smaller ranks are filled up.
* `by_runs`: neighbouring rows of one adapter together, each run with its own two products: nothing is copied
  and nothing wasted, but there are some calls a run.
* `by_slots`: every row through every adapter, one after the other, and only its own is kept: what a compiler
  sees, since nothing but values depends on which row is whose.

Where rows of one adapter are scattered over the batch, they can be laid together first (`laid_together`):
fewer and larger groups and runs, for three calls that copy rows. `chosen` says what is done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.ops.lora_linear import few_rows

#: Neighbouring rows with one adapter: (its name or None for the base, first row, row after the last).
Run = tuple[str | None, int, int]
#: The factors of an adapter, A (r, in) and B (out, r), and its strength.
Term = tuple[Tensor, Tensor, float]


class Layout(NamedTuple):
    """Rows of a batch that lie in some order.

    Attributes:
        order: The rows, those with an adapter only; None for all rows as they come.
        runs: Neighbours of one adapter.
        groups: The adapter of each group; see `groups_of`.
    """

    order: tuple[int, ...] | None
    runs: list[Run]
    groups: tuple[str | None, ...]


def layouts(names: Sequence[str | None]) -> list[Layout]:
    """The rows as they come, and with those of one adapter together where that makes fewer runs."""
    runs = runs_of(names)
    found = [Layout(None, runs, groups_of(runs))]
    used = list(dict.fromkeys(name for name in names if name is not None))
    if len(used) < sum(name is not None for name, _, _ in runs):
        order = tuple(row for own in used for row, name in enumerate(names) if name == own)
        together = runs_of([names[row] for row in order])
        found.append(Layout(order, together, groups_of(together)))
    return found


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


def chosen(choices: Sequence[Layout], few: bool) -> tuple[Layout, str]:
    """The layout to use of those that `layouts` gives, and the way: ``"groups"`` or ``"runs"``.

    Few rows are laid together, since their factors are dearer than they are; others stay where they are.
    Groups take two calls, runs two each; but groups would copy factors too often where runs are of uneven
    length.

    Args:
        choices: Of `layouts`.
        few: There are `few_rows`, or each is one token.
    """
    layout = choices[-1] if few else choices[0]
    return layout, "groups" if len(layout.groups) <= 2 * len(layout.runs) else "runs"


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


def laid_together(
    x: Tensor, result: Tensor, way: Callable[..., Tensor], order: Tensor, fresh: bool = True
) -> Tensor:
    """Another way on some rows, in their order.

    Args:
        x: (rows, ..., in).
        result: (rows, ..., out); where it is fresh and no gradient is recorded, it is written.
        way: Called with these rows of both, and ``fresh``.
        order: The rows, each once.
        fresh: Whether nobody else holds the result.

    Returns:
        (rows, ..., out).
    """
    own = way(x[order], result[order], fresh=True)
    if torch.is_grad_enabled() or not fresh:
        return result.index_copy(0, order, own)
    return result.index_copy_(0, order, own)


def by_slots(x: Tensor, result: Tensor, slots: Sequence[tuple[Tensor, Tensor, Any, Tensor]]) -> Tensor:
    """``result + s · (x Aᵀ) Bᵀ`` in the rows of each slot.

    Args:
        x: (rows, ..., in).
        result: (rows, ..., out); not written.
        slots: A (r, in), B (out, r), the strength s, and whether each row is the slot's: (rows,) of bool.

    Returns:
        (rows, ..., out).
    """
    for a, b, scaling, mine in slots:
        h = F.linear(own_rows(x, mine), a.to(x.dtype)) * scaling
        update = F.linear(h, b.to(h.dtype)).to(result.dtype)
        result = torch.where(along_rows(mine, result), result + update, result)
    return result


def along_rows(mine: Tensor, like: Tensor) -> Tensor:
    """One value for each row, shaped so that it chooses among the rows of a tensor (rows, ...)."""
    return mine.view(-1, *(1,) * (like.dim() - 1))


def own_rows(x: Tensor, mine: Tensor) -> Tensor:
    """``x`` without the values of other rows, where gradients are sums over all rows.

    Zeros stand for them; beside indices, which are looked up, the first of the own rows.
    """
    if not torch.is_grad_enabled():
        return x
    other = x.new_zeros(()) if x.is_floating_point() else x[mine.to(torch.uint8).argmax()]
    return torch.where(along_rows(mine, x), x, other)


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
