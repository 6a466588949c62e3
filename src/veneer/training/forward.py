"""Calling a model: what is under its wrappers, without a cache, without dropout, on batches of rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor

from ..adapters import base_of
from .progress import Progress, Silent


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


@contextmanager
def evaluating(model: Any, base: bool = False) -> Iterator[None]:
    """Without dropout; with ``base``, without the adapters too."""
    was_training = model.training
    model.eval()
    try:
        with model.disable_adapter() if base else nullcontext():
            yield
    finally:
        model.train(was_training)


def batches(
    model: Any,
    rows: Sequence[Any],
    collate: Callable[[Sequence[Any]], dict[str, Tensor]],
    batch_size: int,
    progress: Progress | None = None,
    title: str = "rows",
) -> Iterator[dict[str, Tensor]]:
    """Batches of rows of similar length, the shortest first, on the model's device."""
    device = next(model.parameters()).device
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    with (progress or Silent()).bar(title, len(rows)) as advance:
        for start in range(0, len(ordered), batch_size):
            chosen = ordered[start : start + batch_size]
            yield {name: value.to(device) for name, value in collate(chosen).items()}
            advance(len(chosen), "")
