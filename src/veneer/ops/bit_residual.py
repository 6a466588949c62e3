"""What a 16-bit tensor was before it changed a little, in one byte per element; exact to the last bit.

Read as integers, neighbouring floating-point numbers of one sign differ by one. So where a weight changed by
a few units in the last place, the difference of the bits ``d = bits(old) − bits(new)`` is a small integer,
whatever the weight's size. It is taken modulo 2¹⁶ and split into ``d = low + 256·high``: `low` is kept for
every element, `high`, almost always 0, with its place where it is not. Sums modulo 2¹⁶ lose nothing, so
signed zeros, subnormal numbers, infinities and the payloads of NaNs come back as they were.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: The types whose bits fit.
DTYPES = (torch.bfloat16, torch.float16)


class BitResidual(NamedTuple):
    """``bits(old) − bits(new)`` of two tensors of one shape.

    Attributes:
        low: The lower byte, as a signed number: ``shape``, int8.
        places: Where `high` is not 0, counted along the flattened tensor: ``(k,)``, int32 or int64.
        high: The signed upper byte there: ``(k,)``, int8.
    """

    low: Tensor
    places: Tensor
    high: Tensor

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return sum(tensor.nbytes for tensor in self)


@torch.no_grad()
def between(old: Tensor, new: Tensor) -> BitResidual:
    """What has to be kept to get `old` from `new`.

    Args:
        old: of any shape, bfloat16 or float16.
        new: of the same shape and dtype.
    """
    difference = _bits(old) - _bits(new)
    low = difference.to(torch.int8)
    rest = difference.sub_(low).view(-1)
    places = rest.nonzero().view(-1)
    high = (rest[places] >> 8).to(torch.int8)
    narrow = torch.int32 if old.numel() < 1 << 31 else torch.int64
    return BitResidual(low, places.to(narrow), high)


@torch.no_grad()
def applied(new: Tensor, residual: BitResidual) -> Tensor:
    """`old` of `between`, a tensor of its own: contiguous, with the dtype of `new`."""
    bits = _bits(new) + residual.low
    bits.view(-1).index_add_(0, residual.places, residual.high.to(torch.int16) << 8)
    return bits.view(new.dtype)


@torch.no_grad()
def checksum(tensor: Tensor) -> int:
    """The sum of the bits modulo 2⁶⁴: a 16-bit tensor with another one has changed."""
    bits = _bits(tensor).view(-1)
    whole = bits.numel() // 4 * 4
    words, tail = bits[:whole].view(torch.int64), bits[whole:]
    return (int(words.sum()) + int(tail.sum(dtype=torch.int64))) % (1 << 64)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.int16)
