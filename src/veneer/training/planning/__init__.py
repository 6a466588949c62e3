"""What a training run would do and need, from the model's configuration alone."""

from __future__ import annotations

from .memory import MemoryEstimate, estimate_memory, flops_per_token, optimizer_bytes, seconds_per_step
from .sources import empty_model, shadow

__all__ = [
    "MemoryEstimate",
    "empty_model",
    "estimate_memory",
    "flops_per_token",
    "optimizer_bytes",
    "seconds_per_step",
    "shadow",
]
