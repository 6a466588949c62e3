"""Pure tensor mathematics: no modules, no names, no state."""

from __future__ import annotations

from veneer.ops.dropout import drop_positions, sparse_dropout
from veneer.ops.lora_linear import add_lora_, lora_linear, lora_linear_reference
from veneer.ops.low_rank import compress, cosine, inner, norm, spectrum
from veneer.ops.merging import merge_dense, merge_into_

__all__ = [
    "add_lora_",
    "compress",
    "cosine",
    "drop_positions",
    "inner",
    "lora_linear",
    "lora_linear_reference",
    "merge_dense",
    "merge_into_",
    "norm",
    "sparse_dropout",
    "spectrum",
]
