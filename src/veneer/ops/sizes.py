"""How many bytes a tensor takes, including quantised ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def stored_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor as it is stored.

    A tensor that consists of others counts as their sum. The state of block-wise quantisation and the scales
    of row-wise quantisation are included.
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
