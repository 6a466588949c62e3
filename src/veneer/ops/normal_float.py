"""Rounding a weight to the values that a few bits can store, without storing the bits."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

#: QLoRA's choice: the outermost quantile of the code, halfway between 1 − 1/32 and 1 − 1/30.
_OUTERMOST = 1 - 0.5 * (1 / 32 + 1 / 30)


@lru_cache(maxsize=4)
def _code(bits: int) -> Tensor:
    """The 2^bits values of the NormalFloat code in [−1, 1], ascending, with an exact zero.

    Quantiles of N(0, 1): 2^(bits−1) of the positive side, one fewer of the negative, and zero.
    """
    half = 2 ** (bits - 1)

    def quantiles(count: int) -> Tensor:
        p = torch.linspace(_OUTERMOST, 0.5, count + 1, dtype=torch.float64, device="cpu")[:-1]
        values: Tensor = torch.special.ndtri(p)
        return values

    positive, negative = quantiles(half), -quantiles(half - 1)
    code = torch.cat([negative, torch.zeros(1, dtype=torch.float64, device="cpu"), positive]).sort().values
    return (code / code.abs().max()).float()


def round_to_bits(weight: Tensor, bits: int, block: int = 64) -> Tensor:
    """The nearest weight that ``bits`` bits a value can store.

    2 and 4 bits: the NormalFloat code, scaled by the largest magnitude of each block of ``block``
    consecutive values. 8 bits: whole steps of 1/127 of each row's largest magnitude.

    Args:
        weight: Matrix (out, in), floating point.
        bits: 2, 4 or 8.
        block: Values that share a scale (2 and 4 bits).

    Returns:
        Tensor of the same shape, float32.

    Raises:
        ValueError: For another number of bits.

    Source: Dettmers et al., "QLoRA", 2023, section 3 and appendix E (NF4); Dettmers et al.,
    "LLM.int8()", 2022, section 2 (row-wise absolute maximum).
    """
    if bits not in (2, 4, 8):
        raise ValueError(f"weights are rounded to 2, 4 or 8 bits, not {bits}")
    w = weight.detach().float()
    if w.numel() == 0:
        return w.clone()
    if bits == 8:
        scale = (w.abs().amax(dim=-1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        return (w / scale).round_().clamp_(-127, 127).mul_(scale)
    code = _code(bits).to(w.device)
    flat = w.reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)
    scale = padded.abs().amax(dim=1, keepdim=True)
    unit = padded / scale.clamp_min(torch.finfo(torch.float32).tiny)
    index = torch.bucketize(unit, (code[1:] + code[:-1]) / 2)
    return (code[index] * scale).view(-1)[: flat.numel()].view(w.shape)
