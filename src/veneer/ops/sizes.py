"""How many bytes a tensor takes, also one that stores codes beside their scales."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def stored_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor as it is stored.

    A tensor that is made of others counts as these; one with the state of a block-wise quantisation, or with
    the scales of a row-wise one, counts with it.
    """
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    size = tensor.numel() * tensor.element_size()
    scale = getattr(tensor, "SCB", None)
    return (
        size
        + _of_state(getattr(tensor, "quant_state", None))
        + (stored_bytes(scale) if isinstance(scale, Tensor) else 0)
    )


def _of_state(state: Any) -> int:
    if state is None:
        return 0
    tensors = (getattr(state, name, None) for name in ("absmax", "code", "offset"))
    return sum(stored_bytes(t) for t in tensors if isinstance(t, Tensor)) + _of_state(
        getattr(state, "state2", None)
    )
