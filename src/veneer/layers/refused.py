"""Module types that are known and not adapted."""

from __future__ import annotations

import functools

from torch import nn

#: Types that are known and not adapted, with the reason.
REFUSED: dict[str, str] = {
    **{
        f"bitsandbytes.nn.modules.Embedding{bits}bit": (
            "a quantised embedding looks its rows up in codes, and its library cannot save it; leave the "
            "embedding dense"
        )
        for bits in (4, 8)
    },
    **{
        f"torch.nn.modules.conv.ConvTranspose{n}d": (
            "a transposed convolution's update is not a convolution followed by a 1×1 one, which is what "
            "adapter files hold"
        )
        for n in (1, 2, 3)
    },
    "torch.nn.modules.linear.Bilinear": "its weight is a stack of matrices over two inputs, not one matrix",
    **{
        f"torch.nn.modules.rnn.{name}": (
            "its weights go into a fused recurrent kernel that calls no submodule: a branch beside them "
            "would never run"
        )
        for name in ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
    },
    "torch.nn.modules.sparse.EmbeddingBag": "it reduces over bags inside one kernel; use nn.Embedding",
}


def refusal(module: nn.Module) -> str | None:
    """Why such a module is not adapted, for the types that a user might try; None for all others."""
    kind: type = type(module)
    return _refusal(kind)


@functools.lru_cache(maxsize=256)
def _refusal(kind: type) -> str | None:
    for base in kind.__mro__:
        reason = REFUSED.get(f"{base.__module__}.{base.__qualname__}")
        if reason is not None:
            return reason
    return None
