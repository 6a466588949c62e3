"""Dropout whose cost grows with p, and whose backward needs no mask.

On a CPU, most of the time of dropout is spent on drawing one random number per element. The gaps between
dropped elements have a geometric distribution, so drawing the gaps gives the same result with
``p * numel`` draws. For the backward pass only the positions are kept, as 32-bit integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

#: Above this p, one draw per element and a boolean mask are as fast as drawing gaps (see `benchmarks/`).
DENSE_FROM = 0.5
#: Below this size, calling a few more operations takes longer than the draws that they save.
SPARSE_FROM_NUMEL = 4096
#: float32 draws lie on a grid of 2**-24; for smaller p the draws are few, and float64 keeps the tail exact.
_FLOAT32_FROM_P = 1 / 256
_INT32_LIMIT = 2**31 - 1
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_transforms_active: Callable[[], object] = getattr(
    torch._C, "_are_functorch_transforms_active", torch._C._functorch.peek_interpreter_stack
)


def wants_plain_torch(*tensors: Tensor) -> bool:
    """Whether anything other than plain reverse-mode autograd will differentiate or trace the computation.

    True under `torch.compile` and export, `torch.func` transforms and forward-mode differentiation, and for
    tensor subclasses and complex numbers. A hand-written backward would fail or be wrong there.
    """
    if torch.compiler.is_compiling():
        return True
    for tensor in tensors:  # a loop, not a generator: this runs at every call of every layer
        if type(tensor) not in _PLAIN_TYPES or tensor.dtype.is_complex:
            return True
    return bool(_transforms_active()) or forward_ad._current_level >= 0


def check_probability(p: float) -> None:
    """Raise if p is not a probability.

    Raises:
        ValueError: p is outside [0, 1] or not a number.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"a dropout probability lies in [0, 1], got {p}")


def drop_positions(
    numel: int, p: float, device: torch.device | str = "cpu", generator: torch.Generator | None = None
) -> Tensor:
    """Flat indices, ascending, of the elements that dropout drops: each with probability p, independently.

    The gaps ``floor(log(u) / log(1 - p)) + 1``, u uniform in (0, 1], are geometric; their running sums below
    `numel` are the successes of `numel` Bernoulli trials. Without a generator all draws come from torch's
    global one of the device, so `torch.manual_seed` repeats them and a checkpointed recomputation replays
    them.

    Args:
        numel: number of elements, N.
        p: probability of dropping one, 0 to 1.
        device: where the indices are created; on other devices than the CPU with N draws. On the meta device
            the number is the expected one.
        generator: of the device.

    Returns:
        ``(about p * N,)``, int64.

    Raises:
        ValueError: p is not a probability.
    """
    check_probability(p)
    device = torch.device(device)
    if p == 0.0 or numel == 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    if p == 1.0:
        return torch.arange(numel, device=device)
    if device.type == "meta":
        return torch.empty(round(numel * p), dtype=torch.int64, device=device)
    if device.type != "cpu":
        return (torch.rand(numel, device=device, generator=generator) < p).nonzero().view(-1)
    return _positions_from_gaps(numel, p, generator)


def _positions_from_gaps(numel: int, p: float, generator: torch.Generator | None) -> Tensor:
    parts: list[Tensor] = []
    start = 0
    while start < numel:
        found = _running_gaps(numel - start, p, generator)
        if start:
            found.add_(start)
        start = int(found[-1]) + 1
        parts.append(found)
    found = parts[0] if len(parts) == 1 else torch.cat(parts)
    inside = int(torch.searchsorted(found, numel))
    return found[:inside]


def _running_gaps(numel: int, p: float, generator: torch.Generator | None) -> Tensor:
    """Enough gaps to pass `numel` except once in 30,000 times, as zero-based int64 positions."""
    expected = numel * p
    count = int(expected + 4.0 * math.sqrt(expected * (1.0 - p))) + 8
    dtype = torch.float32 if p >= _FLOAT32_FROM_P else torch.float64
    draws = torch.rand(count, dtype=dtype, device="cpu", generator=generator)
    # rand() is in [0, 1) and does return 0: log1p(-u) stays finite where log(u) would not.
    gaps = draws.neg_().log1p_().div_(math.log1p(-p))
    if dtype == torch.float64:  # of float32 draws and these p no gap is longer than 16.7 / p
        gaps.clamp_(max=float(numel))
    return gaps.to(torch.int64).add_(1).cumsum_(0).sub_(1)


class Draws(NamedTuple):
    """Random numbers of an adapter's own, the same whatever its texts are filled up to.

    Attributes:
        generator: Of the device of what is dropped.
        tokens: Of each text of the adapter.
        filled: Tokens that each text is filled up to.
    """

    generator: torch.Generator
    tokens: int
    filled: int

    def draw(self, x: Tensor, p: float) -> Tensor:
        """`draw` for texts x: (n·filled, in) or (n, …), in which nothing is dropped of what fills them up."""
        count, width = x.shape[0], x.shape[1:].numel()
        if self.tokens == self.filled or count % self.filled:
            return draw(x, p, self.generator)
        texts = count // self.filled
        drop = draw(x[: texts * self.tokens], p, self.generator)
        own, more = self.tokens * width, (self.filled - self.tokens) * width
        if drop.dtype == torch.bool:
            return torch.nn.functional.pad(drop.view(texts, own), (0, more), value=True).view(-1)
        return drop + (drop // own) * more


def draw(x: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """Decide what one dropout of x drops, in the cheaper form.

    Args:
        x: any shape; only its size and device are read.
        p: probability of dropping an element, 0 < p < 1.
        generator: of x's device; None for torch's global one.

    Returns:
        Integer positions as of `drop_positions`, or for a large p, a small x or another device than
        CPU and meta a boolean *keep* mask of ``(numel,)``. `zero_dropped_` and the fused step take either.
    """
    if x.device.type in ("cpu", "meta") and p < DENSE_FROM and x.numel() >= SPARSE_FROM_NUMEL:
        return drop_positions(x.numel(), p, generator=generator)
    return torch.rand(x.numel(), device=x.device, generator=generator) >= p


def packed(drop: Tensor, numel: int) -> Tensor:
    """The form in which `draw` is kept for the backward: positions as int32 where `numel` allows."""
    return drop.to(torch.int32) if drop.dtype == torch.int64 and numel <= _INT32_LIMIT else drop


def unpacked(drop: Tensor) -> Tensor:
    return drop if drop.dtype == torch.bool else drop.long()


def zero_dropped_(x: Tensor, drop: Tensor) -> Tensor:
    """Write zeros over the dropped elements of a contiguous x, in place: ``x: (...) -> (...)``."""
    flat = x.view(-1)
    if drop.dtype == torch.bool:
        flat.mul_(drop)
    else:
        flat.index_put_((drop,), flat.new_zeros(()))
    return x
