"""The differentiable linear step of LoRA: of one adapter, or of several that have rows of their own.

The formulae are those of `veneer.ops.lora_linear`; one product with W serves all rows. Adapters that lie side
by side with equally many rows may form a block, whose products are batched: in a block of k adapters
``X: (k, n, in)``, ``A: (k, r, in)`` and ``B: (k, out, r)``, smaller ranks filled up with zeros. No number of
one adapter takes part in another's sums, so what is not finite stays where it is.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.ops.dropout import Draws, draw, packed, zero_dropped_
from veneer.ops.lora_gradients import (
    Needs,
    Saved,
    add_product_,
    as_rows,
    branch_gradients,
    differentiable_gradients,
)

#: Multiplications that take as long as the calls of one block, for numbers of so many bytes. Calls of wider
#: products take so little time that copying factors into a block never pays.
_WORTH_A_BLOCK = {2: 5_000_000, 4: -1, 8: -1}


class Part(NamedTuple):
    """What a step needs to know of one adapter besides its factors.

    Attributes:
        scaling: s.
        p: Dropout probability.
        rows: Its rows of x as (T, in); by default all of them.
        draws: Decide what is dropped; None for torch's global generator.
    """

    scaling: float
    p: float
    rows: slice = slice(None)
    draws: Draws | None = None


#: A (r, in), B (out, r) and the bias of B (out,) of an adapter.
Factors = tuple[Tensor, Tensor, Tensor | None]


def lora_linear_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[Part], factors: Sequence[Factors]
) -> Tensor:
    """`lora_linear` for adapters that have rows of their own: one product with W for all rows.

    A row without an adapter gets ``x Wᵀ + b``. An adapter's gradients come from its own rows alone.

    Args:
        x: ``(..., in)``; not under autocast, and nothing that `wants_plain_torch`.
        weight: ``(out, in)``, of x's dtype.
        bias: ``(out,)`` or None.
        parts: Rows that do not overlap; an adapter may have several.
        factors: Of each part.

    Returns:
        ``x: (..., in) -> (..., out)``.
    """
    every = [tensor for one in factors for tensor in one]
    blocks = blocks_of(parts, factors, x.dtype)
    y: Tensor = LoraStep.apply(None, x, weight, bias, False, blocks, *every)  # type: ignore[no-untyped-call]
    return y


def add_lora_rows_(
    y: Tensor, x: Tensor, parts: Sequence[Part], factors: Sequence[Factors], *, inplace: bool = False
) -> Tensor:
    """`add_lora_` for adapters that have rows of their own; see `lora_linear_rows`.

    Args:
        y: ``(..., out)``, what the base layer returned for x.
        x: ``(..., in)``.
        parts: Rows that do not overlap.
        factors: Of each part.
        inplace: As for `add_lora_`.

    Returns:
        ``(..., out)`` of y's dtype.
    """
    every = [tensor for one in factors for tensor in one]
    blocks = blocks_of(parts, factors, x.dtype)
    out: Tensor = LoraStep.apply(y, x, None, None, inplace and writable(y), blocks, *every)  # type: ignore[no-untyped-call]
    return out


class Block(NamedTuple):
    """Neighbouring parts of equal size.

    Attributes:
        parts: Which.
        first: The number of the first one among all parts.
        ranks: Of each.
        dtypes: Of their A and of their B.
    """

    parts: tuple[Part, ...]
    first: int
    ranks: tuple[int, ...]
    dtypes: tuple[torch.dtype, torch.dtype]

    def of(self, rows: Tensor) -> Tensor:
        """The block's rows of all: (T, m) -> (k, n, m), or (n, m) of a single part."""
        parts = self.parts
        if len(parts) == 1:
            return rows if parts[0].rows.stop is None else rows[parts[0].rows]
        own = rows[parts[0].rows.start : parts[-1].rows.stop]
        return own.view(len(parts), -1, rows.shape[-1])

    def scale(self, like: Tensor) -> float | Tensor:
        """The strength of the branches that dropout leaves: one number, or (k, 1, 1)."""
        if len(self.parts) == 1:
            return self.parts[0].scaling / (1.0 - self.parts[0].p)
        scales = [part.scaling / (1.0 - part.p) for part in self.parts]
        if len(set(scales)) == 1:
            return scales[0]
        dtype = torch.promote_types(like.dtype, torch.float32)
        return torch.tensor(scales, dtype=dtype, device=like.device).view(-1, 1, 1)

    def drop(self, x: Tensor) -> Tensor | None:
        """What dropout drops of the block's rows x, as `draw` gives it; None for nothing."""
        if len(self.parts) == 1:
            return _drawn(self.parts[0], x)
        if not any(part.p for part in self.parts):
            return None
        return _joined([_drawn(part, own) for part, own in zip(self.parts, x.unbind(), strict=True)], x)


def blocks_of(parts: Sequence[Part], factors: Sequence[Factors], dtype: torch.dtype) -> tuple[Block, ...]:
    """Parts in blocks: neighbours of equal size, unless filling up their ranks costs more than it saves.

    Args:
        parts: In the order of their rows.
        factors: Of each part.
        dtype: That is computed in.
    """
    found: list[list[Part]] = []
    ranks: list[list[int]] = []
    dtypes = []
    before = None
    for part, (A, B, _) in zip(parts, factors, strict=True):
        r, size = A.shape[0], part.rows.stop - part.rows.start
        kind = (size, A.requires_grad, B.requires_grad, A.dtype, B.dtype)
        if kind == before and part.rows.start == found[-1][-1].rows.stop:
            k, most = len(ranks[-1]), max(ranks[-1])
            in_vain = (max(most, r) * (k + 1) - most * k - r) * size * (A.shape[1] + B.shape[0])
            if in_vain <= _WORTH_A_BLOCK[dtype.itemsize]:
                found[-1].append(part)
                ranks[-1].append(r)
                continue
        found.append([part])
        ranks.append([r])
        dtypes.append((A.dtype, B.dtype))
        before = kind
    starts = itertools.accumulate(map(len, found[:-1]), initial=0)
    every = zip(found, starts, ranks, dtypes, strict=True)
    return tuple(Block(tuple(some), start, tuple(own), both) for some, start, own, both in every)


def _drawn(part: Part, x: Tensor) -> Tensor | None:
    if part.p == 0.0:
        return None
    return draw(x, part.p) if part.draws is None else part.draws.draw(x, part.p)


def _joined(drops: Sequence[Tensor | None], x: Tensor) -> Tensor:
    """What is dropped of each part of x, as one: positions if all have them, else a mask of what is kept."""
    size = x.numel() // len(drops)
    if not any(drop is not None and drop.dtype == torch.bool for drop in drops):
        places = [drop + i * size for i, drop in enumerate(drops) if drop is not None]
        return torch.cat(places)
    masks = []
    for drop in drops:
        if drop is None or drop.dtype != torch.bool:
            mask = torch.ones(size, dtype=torch.bool, device=x.device)
            drop = mask if drop is None else mask.index_fill_(0, drop, False)
        masks.append(drop)
    return torch.cat(masks)


def _stacked(factors: Sequence[Tensor | None], axis: int, dtype: torch.dtype) -> Any:
    """A factor of each part of a block in one tensor, filled up along the rank; of a single part as it is."""
    if len(factors) == 1:
        factor = factors[0]
        return factor if factor is None or factor.dtype == dtype else factor.to(dtype)
    every = [factor for factor in factors if factor is not None]
    if not every:
        return None
    ranks = [factor.shape[axis] for factor in every]
    most = max(ranks)
    if torch.is_grad_enabled():
        short = [(0, 0, 0, most - r) if axis == 0 else (0, most - r) for r in ranks]
        return torch.stack([F.pad(f.to(dtype), s) for f, s in zip(every, short, strict=True)])
    shape = list(every[0].shape)
    shape[axis] = most
    new = torch.empty if min(ranks) == most else torch.zeros
    whole = new(len(every), *shape, dtype=dtype, device=every[0].device)
    places = [one.narrow(axis, 0, r) for one, r in zip(whole.unbind(), ranks, strict=True)]
    torch._foreach_copy_(places, every)  # casts too
    return whole


class LoraStep(torch.autograd.Function):
    """Adds the branch of each part to its rows of ``y``, or of ``x Wᵀ + b`` if y is None."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor | None,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        inplace: bool,
        blocks: tuple[Block, ...],
        *factors: Tensor | None,
    ) -> Tensor:
        y, rows, flat = _base_product(ctx, y, x, weight, bias, inplace)
        _, need_x, need_w, _, _, _, *need = ctx.needs_input_grad
        kept: list[Tensor | None] = []
        x_kept, ctx.needs = None, []
        for block in blocks:
            first, k = 3 * block.first, len(block.parts)
            end = first + 3 * k
            As, Bs, biases = factors[first:end:3], factors[first + 1 : end : 3], factors[first + 2 : end : 3]
            own, y_own = block.of(rows), block.of(flat)
            drop = block.drop(own)
            branch_input = own if drop is None else zero_dropped_(own.clone(), drop)
            h = branch_input @ _stacked(As, 0, x.dtype).mT
            add_product_(y_own, h, _stacked(Bs, 1, x.dtype).mT, block.scale(x))
            for i, B_bias in enumerate(biases):
                if B_bias is not None:
                    (y_own if k == 1 else y_own[i]).add_(B_bias.to(x.dtype), alpha=block.parts[i].scaling)
            needs = Needs(need_x, need_w, need[first], need[first + 1])
            saved = Saved(x, weight, As[0], Bs[0], h, drop).for_gradients(needs)
            ctx.needs.append(needs)
            nothing = (None,) * k
            kept += (saved.h, None if saved.drop is None else packed(saved.drop, own.numel()))
            kept += (*(nothing if saved.A is None else As), *(nothing if saved.B is None else Bs))
            x_kept = x_kept if saved.x is None else x
        ctx.save_for_backward(x_kept, weight if need_x else None, *kept)
        ctx.blocks, ctx.shape, ctx.dtype = blocks, x.shape, x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with _without_autocast(grad):
            return LoraStep._gradients(ctx, grad)

    @staticmethod
    def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *kept = ctx.saved_tensors
        need_y, need_x, need_w, need_bias, _, _, *need = ctx.needs_input_grad
        G = as_rows(grad.to(ctx.dtype))
        rows = None if x is None else as_rows(x)
        again, whole = torch.is_grad_enabled(), ctx.blocks[0].parts[0].rows.stop is None
        dx = G @ weight if weight is not None else None
        if dx is None and need_x and not whole:
            dx = G.new_zeros(G.shape[0], ctx.shape[-1])
        gradients: list[Tensor | None] = []
        every = iter(kept)
        for block, needs in zip(ctx.blocks, ctx.needs, strict=True):
            k = len(block.parts)
            h, drop, *both = itertools.islice(every, 2 + 2 * k)
            A, B = _stacked(both[:k], 0, G.dtype), _stacked(both[k:], 1, G.dtype)
            own, x_own = block.of(G), None if rows is None else block.of(rows)
            saved, scale = Saved(x_own, weight, A, B, h, drop), block.scale(G)
            if again:
                scale = scale.to(G.dtype) if isinstance(scale, Tensor) else scale
                saved = saved._replace(h=None if h is None else h * scale)
                more, dA, dB = differentiable_gradients(own, saved, needs, scale, ctx.shape[-1])
                if more is not None:
                    more = more if whole else _among_all(more, block, G.shape[0])
                    dx = more if dx is None else dx + more
            else:
                dx_own = None if dx is None else block.of(dx)
                more, dA, dB = branch_gradients(own, saved, needs, scale, dx_own, block.dtypes)
                dx = more if dx is None else dx
            gradients += _of_each(block, dA, dB, own, need)
        return (
            grad if need_y else None,
            None if dx is None else dx.view(ctx.shape),
            G.t() @ rows if need_w and rows is not None else None,
            G.sum(0) if need_bias else None,
            None,
            None,
            *gradients,
        )


def _of_each(
    block: Block, dA: Tensor | None, dB: Tensor | None, G: Tensor, need: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of A, B and the bias of B of each part of a block, without what filled up the ranks."""
    biases = [
        (G if len(block.parts) == 1 else G[i]).sum(0) * part.scaling
        if need[3 * (block.first + i) + 2]
        else None
        for i, part in enumerate(block.parts)
    ]
    if len(biases) == 1:
        return [dA, dB, *biases]
    found: list[Tensor | None] = []
    for i, (r, bias) in enumerate(zip(block.ranks, biases, strict=True)):
        found += (None if dA is None else dA[i, :r], None if dB is None else dB[i, :, :r], bias)
    return found


def _among_all(own: Tensor, block: Block, count: int) -> Tensor:
    """Rows of a block among zeros for all others: (n, in) or (k, n, in) -> (T, in)."""
    first, last = block.parts[0].rows, block.parts[-1].rows
    return F.pad(own.reshape(-1, own.shape[-1]), (0, 0, first.start, count - last.stop))


def _base_product(
    ctx: Any, y: Tensor | None, x: Tensor, weight: Tensor | None, bias: Tensor | None, inplace: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What a step adds to, x as rows (T, in), and the first as rows (T, out): y or ``x Wᵀ + b``."""
    rows = as_rows(x)
    if y is None:
        flat = F.linear(rows, weight, bias)  # type: ignore[arg-type]
        if x.dim() == 2:
            return flat, rows, flat
        # No view: an in-place operation on one would lose hooks. F.linear gives a view if there is a bias.
        return torch.ops.aten._unsafe_view(flat, (*x.shape[:-1], flat.shape[-1])), rows, flat
    if inplace:
        ctx.mark_dirty(y)
    else:
        y = y.clone(memory_format=torch.contiguous_format)
    return y, rows, y.view(rows.shape[0], y.shape[-1])


def _without_autocast(grad: Tensor) -> AbstractContextManager[Any]:
    """Of a backward: one inside autocast computes in its forward's dtype."""
    kind = grad.device.type
    return torch.autocast(kind, enabled=False) if autocasts(kind) else nullcontext()


def autocasts(kind: str) -> bool:
    """Whether autocast is on for a type of device; torch raises for types that have none (meta)."""
    return _has_autocast(kind) and torch.is_autocast_enabled(kind)


#: Cached, because every call of a layer uses it: a property of the build of torch.
_has_autocast = functools.cache(torch.amp.is_autocast_available)


def writable(y: Tensor) -> bool:
    """Whether a layer may write into what its base returned."""
    return not (
        y._is_view()
        or (y.is_leaf and y.requires_grad)
        or not y.is_contiguous()
        or (y.is_inference() and not torch.is_inference_mode_enabled())
    )
