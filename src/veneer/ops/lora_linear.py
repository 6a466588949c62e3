"""The linear step of LoRA: fused, in plain torch, and the branch alone for base layers that cannot be fused.

Notation: ``X: (T, in)``, ``W: (out, in)``, ``A: (r, in)``, ``B: (out, r)``, ``s`` the scaling, ``G = dY``.
Forward::

    h = X Aᵀ          y = X Wᵀ + b (+ s b_B)          y += s h Bᵀ        in place

Backward, with ``g = G B`` computed once for both uses::

    dB = s (hᵀ G)ᵀ      dA = s gᵀ X      dX = G W        dX += s g A     in place

If the gradient is to be differentiated again (``create_graph=True``), the same is computed out of place, with
h recomputed from X and A so that autograd can follow.

Kept for the backward are X (which neighbouring operations keep too), h of width r, and the dropped positions.

Source: LoRA, arXiv:2106.09685, equation 3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.ops.dropout import check_probability, wants_plain_torch
from veneer.ops.gpu import triton_step
from veneer.ops.lora_step import Block, LoraStep, Part, autocasts, writable

#: Up to this many rows a 16-bit product on a CPU takes constant time, about five times that in float32.
FEW_ROWS = 64


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    B_bias: Tensor | None,
    scaling: float,
    p: float,
    mask: Tensor | None = None,
) -> Tensor:
    """The definition of `lora_linear` in plain torch: what tests, transforms and compilers use.

    ``y = x Wᵀ + b + s (drop(x) Aᵀ Bᵀ + b_B)``.

    Args:
        x, weight, bias, A, B, B_bias, scaling, p: as for `lora_linear`.
        mask: True where x is kept, of x's shape; drawn when it is None.

    Returns:
        ``x: (..., in) -> (..., out)``.
    """
    return F.linear(x, weight, bias) + _branch_reference(x, A, B, B_bias, scaling, p, mask)


def _branch_reference(
    x: Tensor, A: Tensor, B: Tensor, B_bias: Tensor | None, scaling: float, p: float, mask: Tensor | None
) -> Tensor:
    check_probability(p)
    if mask is not None:
        x = torch.where(mask, x, 0.0) / (1.0 - p) if p < 1.0 else torch.zeros_like(x)
    elif p > 0.0:
        x = F.dropout(x, p)
    if not autocasts(x.device.type):
        A, B, B_bias = A.to(x.dtype), B.to(x.dtype), _to(B_bias, x.dtype)
    return scaling * F.linear(F.linear(x, A), B, B_bias)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    B_bias: Tensor | None,
    scaling: float,
    p: float,
) -> Tensor:
    """A linear layer and its low-rank branch in one differentiable step.

    ``y = x Wᵀ + b + s (drop(x) Aᵀ Bᵀ + b_B)``. The factors may have another dtype than x (float32 on a 16-bit
    base): they are cast, x never is. Any subset of the tensors may require grad. Under `torch.compile`,
    `torch.func` transforms and forward-mode differentiation, for tensor subclasses and for p = 1 it is
    `lora_linear_reference`. With ``VENEER_TRITON=1`` it runs in Triton on suitable CUDA devices. Under
    autocast the inputs are cast as `F.linear` would cast them. Derivatives of any order are correct, also
    with dropout. If A is frozen and B is trained, the input is not kept, and ``create_graph=True`` raises.

    Args:
        x: ``(..., in)``, any strides, 1-D and empty batches too.
        weight: ``(out, in)``, the base layer's, of x's dtype.
        bias: ``(out,)`` or None, the base layer's.
        A: ``(r, in)``.
        B: ``(out, r)``.
        B_bias: ``(out,)`` or None; inside the scaling, as in PEFT.
        scaling: s, usually ``lora_alpha / r``.
        p: dropout probability for x in the branch; 0 in evaluation.

    Returns:
        ``x: (..., in) -> (..., out)``, a new tensor, not a view.

    Raises:
        ValueError: p is not a probability.
        RuntimeError: shapes or dtypes of x, weight and bias do not fit, as in `F.linear`. In a backward with
            ``create_graph=True``: A is frozen, B and x require grad, and x was not kept.
    """
    if p == 1.0 or wants_plain_torch(x, weight, A, B):
        return lora_linear_reference(x, weight, bias, A, B, B_bias, scaling, p)
    check_probability(p)
    kind = x.device.type
    if autocasts(kind):
        if torch.float64 in (x.dtype, weight.dtype, A.dtype, B.dtype):  # autocast leaves float64 as it is
            return lora_linear_reference(x, weight, bias, A, B, B_bias, scaling, p)
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = x.to(dtype), weight.to(dtype), _to(bias, dtype)
        with torch.autocast(kind, enabled=False):
            return _fused(x, weight, bias, A, B, B_bias, scaling, p)
    return _fused(x, weight, bias, A, B, B_bias, scaling, p)


def _whole(A: Tensor, B: Tensor, scaling: float, p: float) -> tuple[Block]:
    """One adapter for all rows."""
    return (Block((Part(scaling, p),), 0, A.shape[:1], (A.dtype, B.dtype)),)


def _fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    B_bias: Tensor | None,
    scaling: float,
    p: float,
) -> Tensor:
    if not torch.is_grad_enabled() and p == 0.0 and few_rows(x):
        return linear_of_few_rows(x, weight, bias, A, B, B_bias, scaling)
    step: Any = triton_step(x, weight, bias, A, B, B_bias) if x.is_cuda else None
    if step is not None:
        A, B, B_bias = A.to(x.dtype), B.to(x.dtype), _to(B_bias, x.dtype)
        return step.apply(x, weight, bias, A, B, B_bias, scaling, p)  # type: ignore[no-any-return]
    y: Tensor = LoraStep.apply(None, x, weight, bias, False, _whole(A, B, scaling, p), A, B, B_bias)  # type: ignore[no-untyped-call]
    return y


def add_lora_(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    B_bias: Tensor | None,
    scaling: float,
    p: float,
    *,
    inplace: bool = False,
) -> Tensor:
    """Add the low-rank branch to the output y of a base layer that cannot be fused (quantised, hooked).

    ``y + s (drop(x) Aᵀ Bᵀ + b_B)``. The factors are cast to x's dtype (or to that of autocast), and the sum
    has y's dtype.

    Args:
        y: ``(..., out)``, what the base layer returned for x.
        x: ``(..., in)`` with the leading dimensions of y.
        A, B, B_bias, scaling, p: as for `lora_linear`.
        inplace: write into y. Only for a y that nothing else refers to and that the base layer did not save.
            If y is a view, a leaf that requires grad or an inference tensor, and under a compiler, a new
            tensor is created.

    Returns:
        ``(..., out)`` of y's dtype: y itself if it was written in place, else a new tensor.

    Raises:
        ValueError: p is not a probability, or the leading dimensions of x and y differ.
    """
    check_probability(p)
    if x.shape[:-1] != y.shape[:-1]:
        raise ValueError(f"x {tuple(x.shape)} and y {tuple(y.shape)} must agree but for the last dimension")
    if p == 1.0 or wants_plain_torch(x, y, A, B):
        return y + _branch_reference(x, A, B, B_bias, scaling, p, None).to(y.dtype)
    kind = x.device.type
    inplace = inplace and writable(y)
    if autocasts(kind):
        if x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(kind))
        with torch.autocast(kind, enabled=False):
            return _added(y, x, A, B, B_bias, scaling, p, inplace)
    return _added(y, x, A, B, B_bias, scaling, p, inplace)


def _added(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    B_bias: Tensor | None,
    scaling: float,
    p: float,
    inplace: bool,
) -> Tensor:
    if not torch.is_grad_enabled() and p == 0.0 and few_rows(x):
        y = y if inplace else y.clone(memory_format=torch.contiguous_format)
        return _add_branch_of_few_rows_(y, x, A, B, B_bias, scaling)
    out: Tensor = LoraStep.apply(y, x, None, None, inplace, _whole(A, B, scaling, p), A, B, B_bias)  # type: ignore[no-untyped-call]
    return out


def few_rows(x: Tensor) -> bool:
    """Whether x: (..., in) is so short that a branch's time goes into the calls, not into the products."""
    return x.is_cpu and x.numel() <= FEW_ROWS * x.shape[-1]


def is_decoding_step(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether `linear_of_few_rows` gives what `lora_linear` would. x has the dtype of weight.

    A layer that asks this first spares a token the questions of the general step, which take longer than
    the products.
    """
    return (
        not torch.is_grad_enabled()
        and few_rows(x)
        and weight.is_cpu
        and A.is_cpu
        and B.is_cpu
        and not wants_plain_torch(x, weight, A, B)
        and not autocasts("cpu")
    )


def linear_of_few_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    B_bias: Tensor | None,
    scaling: float,
) -> Tensor:
    """`lora_linear` for the `few_rows` of a decoding step, without a graph, dropout or any check.

    Only where `is_decoding_step`, or for tensors that `lora_linear` has found to be ordinary ones.
    """
    y = F.linear(x, weight, bias)
    return _add_branch_of_few_rows_(y.clone() if y._is_view() else y, x, A, B, B_bias, scaling)


def _add_branch_of_few_rows_(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, B_bias: Tensor | None, scaling: float
) -> Tensor:
    """``y += s (x Aᵀ Bᵀ + b_B)`` in float32 (float64), without a graph and with as few calls as possible.

    y must be contiguous. Adding as part of the product (to a float32 copy of a 16-bit y) is faster than
    adding afterwards. A single row is treated as a vector, whose products take less time to call; to a 16-bit
    y it is added afterwards.
    """
    widened = Tensor.double if x.dtype == torch.float64 else Tensor.float  # faster than `to`
    if x.numel() == x.shape[-1] != 0:
        h = widened(A).mv(widened(x).reshape(-1))
        row = y.view(-1)
        if y.dtype == h.dtype:
            row.addmv_(widened(B), h, alpha=scaling)
        else:
            row.add_(widened(B).mv(h), alpha=scaling)
        return y if B_bias is None else y.add_(widened(B_bias), alpha=scaling)
    h = F.linear(widened(x), widened(A))
    wide = widened(y)
    flat = wide.view(-1, wide.shape[-1])
    flat.addmm_(h.view(-1, h.shape[-1]), widened(B).t(), alpha=scaling)
    if B_bias is not None:
        flat.add_(widened(B_bias), alpha=scaling)
    return y if wide is y else y.copy_(wide)


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)
