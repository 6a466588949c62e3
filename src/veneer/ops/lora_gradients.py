"""Gradients of the linear step, in place for speed and as a graph for ``create_graph=True``.

Notation as in `veneer.ops.lora_linear`: ``g = G B`` is computed once for both of its uses::

    dB = s (hᵀ G)ᵀ      dA = s gᵀ X      dX += s g A
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.ops.dropout import unpacked, zero_dropped_


class Needs(NamedTuple):
    """Which of the four tensors require a gradient."""

    x: bool
    weight: bool
    A: bool
    B: bool


class Saved(NamedTuple):
    """What a forward keeps for its backward: ``x, W, A, B, h = x Aᵀ`` and what was dropped."""

    x: Tensor | None
    weight: Tensor | None
    A: Tensor | None
    B: Tensor | None
    h: Tensor | None
    drop: Tensor | None

    def for_gradients(self, needs: Needs) -> Saved:
        """Only the tensors that the needed gradients depend on."""
        return Saved(
            x=self.x if needs.weight or needs.A else None,
            weight=self.weight if needs.x else None,
            A=self.A if needs.x or (needs.A and needs.B) else None,
            B=self.B if needs.x or needs.A else None,
            h=self.h if needs.B else None,
            drop=self.drop if needs.x or needs.A else None,
        )


def as_rows(tensor: Tensor) -> Tensor:
    """``(..., n) -> (T, n)`` contiguous; also right where T or n is 0."""
    if tensor.dim() == 2:
        return tensor.contiguous()
    return tensor.contiguous().view(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def branch_gradients(
    G: Tensor,
    saved: Saved,
    needs: Needs,
    scale: float,
    dx: Tensor | None,
    dtypes: Sequence[torch.dtype],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``dX``, ``dA`` and ``dB`` of ``scale · drop(x) Aᵀ Bᵀ``.

    Args:
        G: (T, out), the gradient of the output.
        saved: What the forward kept.
        needs: Which gradients are wanted.
        scale: With the ``1 / (1 - p)`` of dropout.
        dx: (T, in), the gradient through the base, to which the branch's is added in place, or None.
        dtypes: Of A and B.
    """
    dB = None if saved.h is None else _outer(saved.h, G, scale, dtypes[1]).t()
    if saved.B is None:
        return dx, None, dB
    g = G @ saved.B.to(G.dtype)
    drop = None if saved.drop is None else unpacked(saved.drop)
    dA = None
    if needs.A and saved.x is not None:
        rows = as_rows(saved.x)
        dA = _outer(g, rows if drop is None else zero_dropped_(rows.clone(), drop), scale, dtypes[0])
    if needs.x and saved.A is not None:
        A = saved.A.to(G.dtype)
        if dx is not None:
            _add_to_kept_(dx, g, A, scale, drop)
        else:
            dx = g.mul_(scale) @ A
            if drop is not None:
                zero_dropped_(dx, drop)
    return dx, dA, dB


def differentiable_gradients(
    G: Tensor, saved: Saved, needs: Needs, scale: float, width: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The branch's ``dX``, ``dA`` and ``dB`` as a graph over G, x, A and B, for ``create_graph=True``.

    Args:
        G: (T, out), the gradient of the output.
        saved: What the forward kept, with h times `scale`; its ``drop`` may be a mask, True where x was kept.
        needs: Which gradients are wanted.
        scale: With the ``1 / (1 - p)`` of dropout.
        width: Of the input.

    Raises:
        RuntimeError: The gradient of B depends on an input that was not kept.
    """
    x, A, B, h = saved.x, saved.A, saved.B, saved.h
    dropped = None if saved.drop is None else _dropped_mask(saved.drop, G.shape[0], width)

    def kept(rows: Tensor) -> Tensor:
        return rows if dropped is None else rows.masked_fill(dropped, 0.0)

    dx = dA = dB = None
    if A is not None:
        A = A.to(G.dtype)
    if B is not None:
        g = G @ B.to(G.dtype) * scale
        dx = kept(g @ A) if needs.x and A is not None else None
        dA = g.t() @ kept(as_rows(x)) if needs.A and x is not None else None
    if h is not None and not needs.x and not needs.A:
        dB = G.t() @ h  # no gradient flows through h
    elif needs.B:
        if x is None or A is None:
            raise RuntimeError(
                "create_graph=True: a LoRA layer whose B trains beside a frozen A does not keep its input, "
                "so the gradient of B cannot be differentiated again. Let A require a gradient too, or use "
                "torch.func (grad, hessian, jacrev), which runs the layer in plain torch"
            )
        dB = G.t() @ (kept(as_rows(x)) @ A.t() * scale)
    return dx, dA, dB


def _outer(thin: Tensor, wide: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """``scale · thinᵀ wide`` for ``thin: (T, r)``, ``wide: (T, n)``: the gradient of a factor, in its dtype.

    Which order is faster depends on the dtype: by itself the difference is small (`benchmarks/products.py`),
    but in float32 a whole step is slower with the thin side first.
    """
    product = (wide.t() @ thin).t() if wide.dtype == torch.float32 else thin.t() @ wide
    if dtype.itemsize > product.dtype.itemsize:
        product = product.to(dtype)  # the scale is applied in the wider type
    return (product if scale == 1.0 else product.mul_(scale)).to(dtype)


def _add_to_kept_(dx: Tensor, g: Tensor, A: Tensor, scale: float, drop: Tensor | None) -> None:
    """``dx += keep * (scale · g A)`` for ``dx: (T, in)``: only the base's gradient where x was dropped."""
    if drop is None:
        dx.addmm_(g, A, alpha=scale)
    elif drop.dtype == torch.bool:
        dx.add_(zero_dropped_(g @ A, drop), alpha=scale)
    else:
        flat = dx.view(-1)
        before = flat.take(drop)
        dx.addmm_(g, A, alpha=scale)
        flat.index_put_((drop,), before)


def _dropped_mask(drop: Tensor, rows: int, width: int) -> Tensor:
    """``(T, in)``, True where x was dropped."""
    if drop.dtype == torch.bool:
        return ~drop.view(rows, width)
    mask = torch.zeros(rows * width, dtype=torch.bool, device=drop.device)
    return mask.index_fill_(0, unpacked(drop), True).view(rows, width)
