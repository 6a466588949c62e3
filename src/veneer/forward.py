"""What the forward of a model takes."""

from __future__ import annotations

import inspect
from typing import Any

from veneer.adapters import base_of


def bare(model: Any) -> Any:
    """The base model, without `PeftModel` and DistributedDataParallel around it."""
    return base_of(getattr(model, "module", model))


def takes(model: Any, name: str) -> bool:
    """Whether the base model's ``forward`` has an argument of this name."""
    return name in inspect.signature(bare(model).forward).parameters


def without_cache(model: Any) -> dict[str, bool]:
    """``use_cache=False`` for models that have it.

    Training never reads a cache, and with one transformers takes packed rows for one sequence.
    """
    return {"use_cache": False} if takes(model, "use_cache") else {}
