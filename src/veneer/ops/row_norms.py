"""Lengths of the rows of a weight and of its low-rank update, without the dense update.

For each row, ``‖w + s·(BA)‖² = ‖w‖² + 2s⟨w, (BA)⟩ + s²‖(BA)‖²``, where the last two terms only need ``W Aᵀ``
and the Gram matrix ``A Aᵀ``, which are as thin as the factors.

Source: expansion of the square; its use for DoRA is Veneer's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from veneer.ops.dropout import wants_plain_torch

#: The share of ‖w‖² below which the sum has lost too many digits, by whether it is computed in the weight's
#: own type: a product with a 16-bit weight is rounded to 16 bits.
_CANCELLED = {True: 1e-3, False: 0.25}


def _work(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def squared_row_norms(weight: Tensor) -> Tensor:
    """``‖w‖²`` of every row, in float32 (float64 where W is). weight: (out, in) -> (out,)."""
    norms: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=_work(weight))
    return norms.square()


def updated_row_norms(squared: Tensor, weight: Tensor, B: Tensor, A: Tensor, scaling: float) -> Tensor:
    """``‖W + s·BA‖`` of every row.

    For a row that the update nearly cancels, this formula is a small difference of large terms, so its norm
    is computed directly. A compiler, a transform or a CUDA graph cannot look at values: there the result has
    the precision of the terms.

    Args:
        squared: (out,), from `squared_row_norms`.
        weight: (out, in), of any floating type. A is cast to its type for their product; everything else is
            float32 (float64 if W is).
        B: (out, r).
        A: (r, in).
        scaling: s.

    Returns:
        (out,), in float32 (float64 where W is).
    """
    work = _work(weight)
    a, b = A.to(squared), B.to(squared)
    across = (F.linear(weight, A.to(weight)).to(work) * b).sum(1)
    own = ((b @ (a @ a.T)) * b).sum(1)
    total = squared + 2.0 * scaling * across + scaling**2 * own
    norms = total.clamp_min(0.0).sqrt()
    if wants_plain_torch(weight, B, A) or (total.is_cuda and torch.cuda.is_current_stream_capturing()):
        return norms
    rows = (total < _CANCELLED[weight.dtype == work] * squared).nonzero().squeeze(1)
    if rows.numel():
        dense = weight[rows].to(work) + scaling * (b[rows] @ a)
        norms = norms.index_copy(0, rows, torch.linalg.vector_norm(dense, dim=1))
    return norms


class State:
    """Tells whether a tensor has changed: its memory, its position there, and its version.

    A different tensor that reuses the same memory is recognised. Writing in place through ``tensor.data`` is
    not noticed by torch, and so not here.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        self._rest = (tensor._version, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)

    @staticmethod
    def of(*tensors: Tensor | None) -> tuple[State, ...] | None:
        """The states of tensors, without those that are None; None if a state cannot be determined."""
        present = [tensor for tensor in tensors if tensor is not None]
        if any(t.is_meta or t.is_inference() or type(t) not in _PLAIN for t in present):
            return None
        return tuple(map(State, present))

    def __eq__(self, other: Any) -> bool:
        same = isinstance(other, State) and self._storage.cdata == other._storage.cdata
        return same and self._rest == other._rest

    __hash__ = None  # type: ignore[assignment]


_PLAIN = (Tensor, torch.nn.Parameter)
