"""Several adapters in one batch.

Three ways to add ``s · (x Aᵀ) Bᵀ`` with the factors of each row's own adapter. In all of them a row is
computed without the factors and values of other adapters' rows, so an infinity stays where it is:

* `by_groups`: groups of neighbouring rows, all of the same size, each with the factors of its adapter: two
  batched products in total, but the factors are copied for each group, and smaller ranks are padded.
* `by_runs`: runs of neighbouring rows with the same adapter, two products each: nothing is copied or padded,
  but there are several calls for each run.
* `by_slots`: every row through every adapter in turn, and only its own result is kept. Used under a compiler,
  because only values depend on which row has which adapter.

If the rows of an adapter are scattered over the batch, they can be gathered first (`on_gathered_rows`): this
makes fewer and larger groups and runs, and takes three calls that copy rows. `choose` decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.ops.lora_linear import few_rows

#: Numbers that are copied in the time of the two calls of a run.
_WORTH_A_RUN = 20_000
#: Neighbouring rows with the same adapter: (its name or None for the base, first row, row after the last).
Run = tuple[str | None, int, int]
#: The factors of an adapter, A (r, in) and B (out, r), and its strength.
Term = tuple[Tensor, Tensor, float]


class Layout(NamedTuple):
    """An order of the rows of a batch, and its runs and groups.

    Attributes:
        order: The rows that have an adapter, gathered; None for all rows in their original order.
        runs: Neighbouring rows with the same adapter.
        groups: The adapter of each group; see `groups_of`.
    """

    order: tuple[int, ...] | None
    runs: list[Run]
    groups: tuple[str | None, ...]


def layouts(names: Sequence[str | None]) -> list[Layout]:
    """The original order, and the one gathered by adapter if that makes fewer runs."""
    runs = runs_of(names)
    found = [Layout(None, runs, groups_of(runs))]
    used = list(dict.fromkeys(name for name in names if name is not None))
    if len(used) < sum(name is not None for name, _, _ in runs):
        order = tuple(row for own in used for row, name in enumerate(names) if name == own)
        together = runs_of([names[row] for row in order])
        found.append(Layout(order, together, groups_of(together)))
    return found


def runs_of(names: Sequence[str | None]) -> list[Run]:
    """Runs of equal names."""
    found: list[Run] = []
    for row, name in enumerate(names):
        if found and found[-1][0] == name:
            found[-1] = (name, found[-1][1], row + 1)
        else:
            found.append((name, row, row + 1))
    return found


def groups_of(runs: Sequence[Run]) -> tuple[str | None, ...]:
    """The adapter of each group: the runs are cut into groups of one size, the largest possible."""
    size = math.gcd(*(stop - start for _, start, stop in runs))
    return tuple(name for name, start, stop in runs for _ in range((stop - start) // size))


def working_dtype(x: Tensor) -> torch.dtype:
    """The type to compute a branch in: on a CPU, a few rows of 16 bits take longer than in float32."""
    few = few_rows(x)
    return torch.float32 if few and x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def copied(x: Tensor, terms: Collection[Term]) -> int:
    """How many numbers `stacked` copies for each group of rows x; 0 where that takes less time than calls."""
    if not x.is_cpu or x.dtype.itemsize < 4:  # 16-bit products take longer to call
        return 0
    return max(len(a) for a, _, _ in terms) * max(a.shape[1] + len(b) for a, b, _ in terms)


def choose_layout(choices: Sequence[Layout], few: bool, size: int = 0) -> tuple[Layout, str]:
    """Which of the `layouts` to use, and how: ``"groups"`` or ``"runs"``.

    A few rows are gathered, because copying them takes less time than further products; many rows stay in
    place. Groups take two calls in total and runs two calls each, but groups copy the factors, filled up to
    the largest rank: too often if the lengths of the runs are uneven, and too many of them if they are large.
    For a few rows they are copied once in a call of `generate`.

    Args:
        choices: What `layouts` returned.
        few: Whether there are `few_rows`, or rows of one token.
        size: Numbers that are `copied` for each group.
    """
    layout = choices[-1] if few else choices[0]
    groups, runs = len(layout.groups), len(layout.runs)
    cheap = groups <= 2 * runs and (few or groups * size <= runs * _WORTH_A_RUN)
    return layout, "groups" if cheap else "runs"


def stacked(terms: Sequence[Term | None], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The factors of each group for `by_groups`, and their strengths: (G, r, in), (G, out, r) and (G, 1, 1).

    Args:
        terms: The term of each group's adapter; None for the base, which becomes zeros.
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
    """A (r, in) and B (out, r), padded with zeros to a larger rank."""
    short = rank - a.shape[0]
    return (F.pad(a, (0, 0, 0, short)), F.pad(b, (0, short))) if short else (a, b)


def by_groups(x: Tensor, result: Tensor, a: Tensor, b: Tensor, scales: Tensor, fresh: bool = True) -> Tensor:
    """``result`` plus the update of each group's adapter.

    Args:
        x: (rows, ..., in): the rows of the first group, of the second, and so on.
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
    """``result`` plus the update of each run's adapter.

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


def on_gathered_rows(
    x: Tensor, result: Tensor, function: Callable[..., Tensor], order: Tensor | None, fresh: bool = True
) -> Tensor:
    """Apply one of the other functions to some rows, in a given order.

    Args:
        x: (rows, ..., in).
        result: (rows, ..., out); where it is fresh and no gradient is recorded, it is written.
        function: Called with these rows of both, and ``fresh``.
        order: The rows, each once; None for all of them, as they are.
        fresh: Whether nobody else holds the result.

    Returns:
        (rows, ..., out).
    """
    if order is None:
        return function(x, result, fresh=fresh)
    own = function(x[order], result[order], fresh=True)
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
    return mine.view(-1, *(1,) * (like.dim() - 1))


def own_rows(x: Tensor, mine: Tensor) -> Tensor:
    """``x`` without the values of other rows: the gradients of the factors are sums over all rows.

    They are replaced by zeros, or, if x contains indices, by the first of the own rows.
    """
    if not torch.is_grad_enabled():
        return x
    if x.is_floating_point():
        other = x.new_zeros(())
    else:  # not by [], for which compilers want the number itself
        other = x.index_select(0, mine.to(torch.uint8).argmax(0, keepdim=True))
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
