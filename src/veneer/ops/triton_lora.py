"""The fused linear step on a GPU: `lora_linear` by the kernels of `veneer.ops.triton_kernels`.

The formulae are those of `veneer.ops.lora_linear`. Only the two products of full size read or write tensors
of full size more than once::

    h = s drop(X) Aᵀ      y = h Bᵀ + X Wᵀ + b + s b_B          h Bᵀ is where the sum of a block of y begins
    g = s G B             dX = keep * (g A) + G W               likewise
    dA = gᵀ drop(X)       dB = (hᵀ G)ᵀ

For dropout, one 64-bit seed is drawn from torch's generator of the device and read by the kernels, without
synchronising with the device.

This has been run in Triton's interpreter and through its compiler, but not on a GPU yet: `disagreement` tests
a device before it is used. Importing this module imports Triton; only `veneer.ops.gpu` does so.

Source: LoRA, arXiv:2106.09685, equation 3; Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2,
3", SC 2011.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from veneer.ops import triton_kernels as kernels
from veneer.ops.lora_gradients import Needs, Saved, differentiable_gradients

#: Shared memory per block, in bytes, that the larger of two tilings needs.
ROOMY = 160_000
#: Rows for one program of `correlation`, and the largest number of programs.
ROWS_EACH, SHARES = 512, 8


@dataclass(frozen=True)
class Tiling:
    """Block sizes and launch options of the two large products."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


#: 144 KB of operands, for the shared memory of A100, H100 and later; 64 KB for that of other GPUs.
LARGE = Tiling(128, 256, 64, num_warps=8, num_stages=3)
SMALL = Tiling(128, 128, 32, num_warps=4, num_stages=4)


@functools.cache
def tiling(device: torch.device) -> Tiling:
    """The larger tiling if it fits the shared memory of a block."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        if getattr(found, "shared_memory_per_block_optin", 0) >= ROOMY:
            return LARGE
    return SMALL


@dataclass(frozen=True)
class Dropout:
    """Decides which elements of an input are dropped: a seed on the device, and ``p * 2**32``."""

    seed: Tensor | None
    threshold: int

    @classmethod
    def of(cls, seed: Tensor | None, p: float) -> Dropout:
        """Dropout with probability p, to within 2**-32; none without a seed."""
        return cls(seed, min(round(p * 2**32), 2**32 - 1))

    def mask(self, rows: int, width: int) -> Tensor:
        """``(rows, width)``, True where elements are kept."""
        assert self.seed is not None
        out = torch.empty(rows, width, dtype=torch.bool, device=self.seed.device)
        grid = (triton.cdiv(rows, 64), triton.cdiv(width, 64))
        _launch(kernels.mask, grid, out, self.seed, self.threshold, rows, width, BLOCK_M=64, BLOCK_N=64)
        return out


def product(
    out: Tensor,
    x: Tensor,
    y: Tensor,
    left: Tensor,
    right: Tensor,
    dropout: Dropout | None = None,
    bias: Tensor | None = None,
    branch_bias: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """``out = keep * (left right) + x y + bias + scaling branch_bias``, keep only with dropout.

    ``x: (M, K)``, ``y: (K, N)``, ``left: (M, R)`` contiguous, ``right: (R, N)``, ``out: (M, N)`` contiguous.
    """
    (M, K), (R, N) = x.shape, right.shape
    tiles = tiling(out.device)
    seed, threshold = (None, 0) if dropout is None else (dropout.seed, dropout.threshold)
    _launch(
        kernels.product, (triton.cdiv(M, tiles.BLOCK_M) * triton.cdiv(N, tiles.BLOCK_N),),
        x, y, left, right, bias, branch_bias, out, seed, threshold, scaling,
        M, N, K, R, *x.stride(), *y.stride(), *right.stride(),
        BLOCK_R=_block(R), GROUP=8, **vars(tiles),
    )  # fmt: skip
    return out


def projection(x: Tensor, A: Tensor, scale: float, dropout: Dropout) -> Tensor:
    """``scale (keep * x) Aᵀ``: ``x: (M, K)``, ``A: (R, K) -> (M, R)``."""
    (M, K), R = x.shape, A.shape[0]
    out = x.new_empty(M, R)
    _launch(
        kernels.projection, (triton.cdiv(M, 32), triton.cdiv(R, _block(R))),
        x, A, out, dropout.seed, dropout.threshold, scale,
        M, K, R, *x.stride(), *A.stride(),
        BLOCK_M=32, BLOCK_K=128, BLOCK_R=_block(R), num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


def correlation(g: Tensor, x: Tensor, dropout: Dropout) -> Tensor:
    """``gᵀ (keep * x)``: ``g: (M, R)`` contiguous, ``x: (M, N) -> (R, N)``."""
    (M, R), N = g.shape, x.shape[1]
    each = max(ROWS_EACH, triton.cdiv(M, SHARES))
    parts = g.new_empty(triton.cdiv(M, each), R, N, dtype=torch.float32)
    _launch(
        kernels.correlation, (triton.cdiv(N, 64), triton.cdiv(R, _block(R)), parts.shape[0]),
        g, x, parts, dropout.seed, dropout.threshold,
        M, N, R, *x.stride(), each,
        BLOCK_M=64, BLOCK_N=64, BLOCK_R=_block(R), num_warps=4, num_stages=3,
    )  # fmt: skip
    return parts.sum(0).to(g.dtype)


def _block(rank: int) -> int:
    return min(max(1 << (rank - 1).bit_length(), 16), 64)


def _launch(kernel: Any, grid: tuple[int, ...], *given: Any, **options: Any) -> None:
    """Run a kernel on the device of its first tensor, unless there is nothing to compute."""
    if math.prod(grid):
        with torch.cuda.device(given[0].device if given[0].is_cuda else -1):
            kernel[grid](*given, **options)


class TritonLora(torch.autograd.Function):
    """`lora_linear` for tensors of one 16-bit (or float32) type, on one GPU."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        B_bias: Tensor | None,
        scaling: float,
        p: float,
    ) -> Tensor:
        """``y = x Wᵀ + b + s (drop(x) Aᵀ Bᵀ + b_B)``: ``x: (..., in) -> (..., out)``."""
        rows, scale = _flat(x), scaling / (1.0 - p)
        seed = torch.randint(2**63 - 1, (1,), device=x.device) if p > 0.0 else None
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        h = projection(rows, A, scale, Dropout.of(seed, p))
        product(_flat(y), rows, weight.t(), h, B.t(), None, bias, B_bias, scaling)
        need_x, need_w, _, need_a, need_b = ctx.needs_input_grad[:5]
        ctx.needs = Needs(need_x, need_w, need_a, need_b)
        ctx.save_for_backward(*Saved(x, weight, A, B, h, seed).for_gradients(ctx.needs))
        ctx.scale, ctx.scaling, ctx.p, ctx.shape = scale, scaling, p, x.shape
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients that are needed; with ``create_graph=True`` as a graph of plain torch."""
        with torch.autocast(grad.device.type, enabled=False):  # as in forward, wherever backward is called
            return TritonLora._gradients(ctx, _flat(grad))

    @staticmethod
    def _gradients(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, h, seed = ctx.saved_tensors
        need_x, need_w, need_bias, need_a, need_b, need_bb = ctx.needs_input_grad[:6]
        dropout = Dropout.of(seed, ctx.p)
        dx = dA = dB = None
        if torch.is_grad_enabled():
            keep = None if seed is None else dropout.mask(G.shape[0], ctx.shape[-1])
            kept = Saved(x, weight, A, B, h, keep)
            dx, dA, dB = differentiable_gradients(G, kept, ctx.needs, ctx.scale, ctx.shape[-1])
            dx = G @ weight + dx if dx is not None else None
        else:
            dB = (h.t() @ G).t() if need_b else None
            if need_x or need_a:
                g = (G @ B).mul_(ctx.scale)
                if need_a:
                    dA = correlation(g, _flat(x), dropout)
                if need_x:
                    dx = product(G.new_empty(G.shape[0], A.shape[1]), G, weight, g, A, dropout)
        summed = G.sum(0) if need_bias or need_bb else None
        return (
            None if dx is None else dx.view(ctx.shape),
            G.t() @ _flat(x) if need_w else None,
            summed if need_bias else None,
            dA,
            dB,
            summed * ctx.scaling if summed is not None and need_bb else None,
            None,
            None,
        )


@torch.no_grad()
def disagreement(device: torch.device, dtype: torch.dtype) -> str | None:
    """What the kernels get wrong on a device, or None.

    A small step, values and gradients, is compared with float64. The global generators are not changed. The
    call synchronises with the device.
    """
    numbers = torch.Generator("cpu").manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=numbers, device="cpu").to(device, dtype)

    rows, inside, out, r, p = 208, 272, 304, 16, 0.25  # several blocks, none of them full; multiples of 16
    x, W, A, B, bias, G = (
        normal(*size) for size in ((rows, inside), (out, inside), (r, inside), (out, r), (out,), (rows, out))
    )
    dropout = Dropout.of(torch.tensor([1], device=device), p)
    keep = dropout.mask(rows, inside).double()
    h, g = projection(x, A, 0.5, dropout), G @ B
    y = product(x.new_empty(rows, out), x, W.t(), h, B.t(), None, bias, bias, 2.0)
    dx = product(x.new_empty(rows, inside), G, W, g, A, dropout)
    dA = correlation(g, x, dropout)
    x, W, A, B, bias, G, low, g = (t.double() for t in (x, W, A, B, bias, G, h, g))
    expected = {
        "the projection": (h, 0.5 * (keep * x) @ A.t()),
        "the output": (y, x @ W.t() + low @ B.t() + 3.0 * bias),
        "the gradient of the input": (dx, G @ W + keep * (g @ A)),
        "the gradient of A": (dA, g.t() @ (keep * x)),
    }
    for name, (found, right) in expected.items():
        error = float((found.double() - right).norm() / right.norm())
        if not error <= torch.finfo(dtype).eps:
            return f"{name} is off by {error:.1e} of its size"
    share = 1.0 - float(keep.mean())
    return None if abs(share - p) <= 0.01 else f"dropout drops {share:.3f}, not {p}"


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
