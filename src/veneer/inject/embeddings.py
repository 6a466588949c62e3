"""The embeddings that a model says it has."""

from __future__ import annotations

from typing import Literal

from torch import nn


def embedding_of(model: nn.Module, side: Literal["input", "output"]) -> nn.Module | None:
    """What a transformers model gives as its input embedding or output head; None where it does not say."""
    getter = getattr(model, f"get_{side}_embeddings", None)
    try:
        module = getter() if callable(getter) else None
    except (NotImplementedError, AttributeError):  # models that have none
        return None
    return module if isinstance(module, nn.Module) else None
