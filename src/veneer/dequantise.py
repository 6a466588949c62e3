"""Ordinary modules in the place of quantised ones."""

from __future__ import annotations

import torch
from torch import nn

from veneer import backends
from veneer.rollback import Rollback


def dequantise(model: nn.Module, back: Rollback, dtype: torch.dtype | None = None) -> None:
    """Replace every quantised module of a model by one that computes the same from a dense weight.

    Args:
        model: The model, adapted or not; changed in place.
        back: Restores the quantised modules after a failure.
        dtype: Type of the dense weights; None takes that of the model's configuration, or else the one that
            was quantised.

    Raises:
        MergeError: If one cannot be read. Nothing has changed then.
    """
    if dtype is None:
        dtype = getattr(getattr(model, "config", None), "dtype", None)
        dtype = dtype if isinstance(dtype, torch.dtype) else None
    twins: dict[int, nn.Module] = {}
    places: list[tuple[nn.Module, str, nn.Module]] = []
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            backend = None if child is None else backends.quantised(child)
            if child is not None and backend is not None:
                if id(child) not in twins:
                    twins[id(child)] = backend.dense(child, dtype)
                places.append((parent, name, twins[id(child)]))
    for parent, name, twin in places:
        back.hold(parent)
        parent._modules[name] = twin


def forget_quantisation(model: nn.Module) -> None:
    """Take away what transformers notes of a quantised model, so that it saves and casts like any other."""
    for holder in (m for m in model.modules() if hasattr(m, "config")):
        for name in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
            holder.__dict__.pop(name, None)
        if holder.__dict__.get("is_quantized"):
            del holder.__dict__["is_quantized"]
        if hasattr(holder.config, "quantization_config"):
            del holder.config.quantization_config
