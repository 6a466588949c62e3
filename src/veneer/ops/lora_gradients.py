"""Gradients of the linear step, in place for speed and as a graph for ``create_graph=True``.

Notation as in `veneer.ops.lora_linear`: ``g = G B`` is computed once for both of its uses::

    dB = s (hᵀ G)ᵀ      dA = s gᵀ X      dX += s g A

All of them also work for a block of k adapters with equally many rows: with a leading dimension of k, and
``s: (k, 1, 1)`` where it differs.
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


def add_product_(y: Tensor, thin: Tensor, wide: Tensor, scale: float | Tensor) -> None:
    """``y += scale · thin wide`` for ``thin: (..., T, r)``, ``wide: (..., r, n)``, in the dtype of thin."""
    if isinstance(scale, Tensor):
        thin, scale = (thin * scale).to(thin.dtype), 1.0
    if y.dtype != thin.dtype:
        y.add_(thin @ wide, alpha=scale)
    elif y.dim() == 2:
        y.addmm_(thin, wide, alpha=scale)
    else:
        y.baddbmm_(thin, wide, alpha=scale)


def branch_gradients(
    G: Tensor,
    saved: Saved,
    needs: Needs,
    scale: float | Tensor,
    dx: Tensor | None,
    dtypes: Sequence[torch.dtype],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``dX``, ``dA`` and ``dB`` of ``scale · drop(x) Aᵀ Bᵀ``.

    Args:
        G: (..., T, out), the gradient of the output.
        saved: What the forward kept, in the shape and dtype of G.
        needs: Which gradients are wanted.
        scale: With the ``1 / (1 - p)`` of dropout.
        dx: (..., T, in), the gradient through the base, to which the branch's is added in place, or None.
        dtypes: Of A and B.
    """
    dB = None if saved.h is None else _outer(saved.h, G, scale, dtypes[1], turned=True)
    if saved.B is None:
        return dx, None, dB
    g = _thin(G, saved.B)
    drop = None if saved.drop is None else unpacked(saved.drop)
    dA = None
    if needs.A and saved.x is not None:
        rows = saved.x if drop is None else zero_dropped_(saved.x.clone(), drop)
        dA = _outer(g, rows, scale, dtypes[0])
    if needs.x and saved.A is not None:
        if dx is not None:
            _add_to_kept_(dx, g, saved.A, scale, drop)
        else:
            dx = g.mul_(scale) @ saved.A
            if drop is not None:
                zero_dropped_(dx, drop)
    return dx, dA, dB


def differentiable_gradients(
    G: Tensor, saved: Saved, needs: Needs, scale: float | Tensor, width: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The branch's ``dX``, ``dA`` and ``dB`` as a graph over G, x, A and B, for ``create_graph=True``.

    Args:
        G: (..., T, out), the gradient of the output.
        saved: What the forward kept, with h times `scale`; its ``drop`` may be a mask, True where x was kept.
        needs: Which gradients are wanted.
        scale: With the ``1 / (1 - p)`` of dropout.
        width: Of the input.

    Raises:
        RuntimeError: The gradient of B depends on an input that was not kept.
    """
    x, A, B, h = saved.x, saved.A, saved.B, saved.h
    dropped = None if saved.drop is None else _dropped_mask(saved.drop, G, width)

    def kept(rows: Tensor) -> Tensor:
        return rows if dropped is None else rows.masked_fill(dropped, 0.0)

    dx = dA = dB = None
    if A is not None:
        A = A.to(G.dtype)
    if B is not None:
        g = G @ B.to(G.dtype) * scale
        dx = kept(g @ A) if needs.x and A is not None else None
        dA = g.mT @ kept(_rows_like(x, G)) if needs.A and x is not None else None
    if h is not None and not needs.x and not needs.A:
        dB = G.mT @ h  # no gradient flows through h
    elif needs.B:
        if x is None or A is None:
            raise RuntimeError(
                "create_graph=True: a LoRA layer whose B trains beside a frozen A does not keep its input, "
                "so the gradient of B cannot be differentiated again. Let A require a gradient too, or use "
                "torch.func (grad, hessian, jacrev), which runs the layer in plain torch"
            )
        dB = G.mT @ (kept(_rows_like(x, G)) @ A.mT * scale)
    return dx, dA, dB


def _rows_like(x: Tensor, G: Tensor) -> Tensor:
    """``x: (..., in)`` with the leading dimensions of G."""
    return x.contiguous().view(*G.shape[:-1], x.shape[-1])


def _thin(G: Tensor, B: Tensor) -> Tensor:
    """``G B`` for ``G: (..., T, out)``, ``B: (..., out, r)``.

    In more than 16 bits the thin side comes first: the other way round, a rank that fills no vector register
    of the processor takes several times as long (`benchmarks/products.py`).
    """
    return G @ B if G.dtype.itemsize == 2 else (B.mT @ G.mT).mT


def _outer(
    thin: Tensor, wide: Tensor, scale: float | Tensor, dtype: torch.dtype, *, turned: bool = False
) -> Tensor:
    """``scale · thinᵀ wide`` for ``thin: (..., T, r)``, ``wide: (..., T, n)``: the gradient of a factor.

    The thin side comes first, as in `_thin`.

    Args:
        thin, wide, scale: As above.
        dtype: Of the factor.
        turned: Return its transpose, contiguous as optimizers want it.
    """
    product = thin.mT @ wide
    if turned:
        product = product.mT
    if dtype.itemsize > product.dtype.itemsize:  # the scale is applied in the wider type
        product = product.to(dtype, memory_format=torch.contiguous_format)
    elif turned:
        product = product.contiguous()
    if isinstance(scale, Tensor) or scale != 1.0:
        product.mul_(scale)
    return product if product.dtype == dtype else product.to(dtype)


def _add_to_kept_(dx: Tensor, g: Tensor, A: Tensor, scale: float | Tensor, drop: Tensor | None) -> None:
    """``dx += keep * (scale · g A)`` for ``dx: (..., T, in)``: only the base's where x was dropped."""
    if drop is None:
        add_product_(dx, g, A, scale)
    elif drop.dtype == torch.bool:
        dx.add_(zero_dropped_(g @ A, drop).mul_(scale))
    else:
        flat = dx.view(-1)
        before = flat.take(drop)
        add_product_(dx, g, A, scale)
        flat.index_put_((drop,), before)


def _dropped_mask(drop: Tensor, G: Tensor, width: int) -> Tensor:
    """``(..., T, in)``, True where x was dropped."""
    shape = (*G.shape[:-1], width)
    if drop.dtype == torch.bool:
        return ~drop.view(shape)
    mask = torch.zeros(math.prod(shape), dtype=torch.bool, device=drop.device)
    return mask.index_fill_(0, unpacked(drop), True).view(shape)
