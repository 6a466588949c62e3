"""What adapters do to rows of their own, in place: no tensor of the whole batch for each adapter.

Plain autograd would copy the gradient of the whole batch for each write into a part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.ops.lora_step import writable


def add_to_rows_(y: Tensor, parts: Sequence[tuple[slice, Tensor, float]], *, inplace: bool = False) -> Tensor:
    """``y[rows] += s · part`` for each part, in y's dtype.

    Args:
        y: (n, …).
        parts: Rows that do not overlap, the part and s.
        inplace: Write into y. Only for a y that nothing else refers to and that what made it did not save.

    Returns:
        (n, …): y itself if it was written in place, else a new tensor.
    """
    rows, tensors, scales = zip(*parts, strict=True)
    result: Tensor = _Add.apply(y, inplace and writable(y), rows, scales, *tensors)  # type: ignore[no-untyped-call]
    return result


def scale_rows_(
    y: Tensor, parts: Sequence[tuple[slice, Tensor]], bias: Tensor | None, *, inplace: bool = False
) -> Tensor:
    """``y[rows] = c y[rows] + (1 - c) b`` for each part: all but the bias is scaled.

    For the backward, y is kept in these rows. ``create_graph=True`` raises.

    Args:
        y: (n, …).
        parts: Rows that do not overlap, and c, shaped to broadcast with an output.
        bias: b, shaped likewise, or None.
        inplace: As for `add_to_rows_`.

    Returns:
        (n, …) of y's dtype.
    """
    rows, scales = zip(*parts, strict=True)
    scales = [scale.to(y.device) for scale in scales]
    result: Tensor = _Scale.apply(y, inplace and writable(y), rows, bias, *scales)  # type: ignore[no-untyped-call]
    return result


def scaled(y: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """``c y + (1 - c) b`` in y's dtype: `scale_rows_` for all rows, in plain torch."""
    if bias is None:
        return torch.mul(y, scale, out=out).to(y)
    return torch.addcmul((1.0 - scale) * bias, y, scale, out=out).to(y)


def _target(ctx: Any, y: Tensor, inplace: bool) -> Tensor:
    if not inplace:
        return y.clone()
    ctx.mark_dirty(y)
    return y


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, inplace: bool, rows: Sequence[slice], scales: Sequence[float], *parts: Tensor
    ) -> Tensor:
        y = _target(ctx, y, inplace)
        for own, scale, part in zip(rows, scales, parts, strict=True):
            y[own].add_(part.to(y.device), alpha=scale)
        ctx.rows, ctx.scales = rows, scales
        ctx.kinds = [(part.device, part.dtype) for part in parts]
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        own = (
            (grad[rows] if scale == 1.0 else grad[rows] * scale).to(*kind)
            for rows, scale, kind in zip(ctx.rows, ctx.scales, ctx.kinds, strict=True)
        )
        return (grad, None, None, None, *own)


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, inplace: bool, rows: Sequence[slice], bias: Tensor | None, *scales: Tensor
    ) -> Tensor:
        y = _target(ctx, y, inplace)
        kept = []
        for own, scale in zip(rows, scales, strict=True):
            kept.append(y[own].clone())
            scaled(kept[-1], scale, bias, out=y[own])
        ctx.save_for_backward(bias, *scales, *kept)
        ctx.rows = rows
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: DoRA's step for rows of several adapters keeps what it scaled in place, "
                "which is no part of the graph. Compute each adapter's rows in a call of their own"
            )
        bias, *more = ctx.saved_tensors
        need_y, _, _, need_bias, *_ = ctx.needs_input_grad
        dy = grad.clone() if need_y else None
        of_bias, of_scales = None if bias is None else torch.zeros_like(bias), []
        scales, kept = more[: len(ctx.rows)], more[len(ctx.rows) :]
        for own, scale, before in zip(ctx.rows, scales, kept, strict=True):
            part = grad[own].to(scale.dtype)
            found = (part * before).sum_to_size(scale.shape)
            if bias is not None:
                total = part.sum_to_size(scale.shape)
                found = found - bias * total
                of_bias += (1.0 - scale) * total
            of_scales.append(found)
            if dy is not None:
                dy[own].mul_(scale)
        return (dy, None, None, of_bias if need_bias else None, *of_scales)
