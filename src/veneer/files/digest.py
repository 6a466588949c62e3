"""A digest of an adapter's data that costs little beside reading them. It finds damage, not forgery.

SHA-256 of the sums of every 4,096 bytes, each the sum modulo 2**64 of 64-bit integers, and of the bytes that
are left over. Hashing the data itself would take two thirds as long again as loading a large adapter.
"""

from __future__ import annotations

import ctypes
import hashlib
from typing import Any

import torch

#: Key of a safetensors file's metadata: the digest of all bytes after the header, in hexadecimal.
DATA_DIGEST = "veneer_digest"

_WORDS = 512


def data_digest(memory: Any, first: int) -> str:
    """The digest of what a mapped file holds from byte ``first`` on; see this module.

    Args:
        memory: `torch.UntypedStorage` of the whole file.
        first: The first byte of the data; safetensors writes multiples of 8, other programs may not.
    """
    data = torch.empty(0, dtype=torch.uint8).set_(memory[first:])
    data = data.clone() if first % 8 else data
    whole = data.numel() // (8 * _WORDS) * (8 * _WORDS)
    sums = data[:whole].view(torch.int64).view(-1, _WORDS).sum(1)
    return hashlib.sha256(_bytes(sums.view(torch.uint8)) + _bytes(data[whole:])).hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    return ctypes.string_at(tensor.data_ptr(), tensor.numel())
