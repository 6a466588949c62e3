"""Calling a model without dropout, and on batches of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..forward import in_mode
from .progress import Progress, Silent


@contextmanager
def evaluating(model: Any, base: bool = False) -> Iterator[None]:
    """Without dropout; with ``base``, without the adapters too."""
    with in_mode(model, False), model.disable_adapter() if base else nullcontext():
        yield


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


def mixed(batch: dict[str, Tensor], names: Sequence[str], most: int) -> Iterator[dict[str, Any]]:
    """Every row of a batch once for each adapter, as mixed batches with their ``adapter_names``.

    Args:
        batch: ``input_ids`` (rows, length), and what else has a row for each of them.
        names: The adapters of a model, `BASE` for none.
        most: Tokens that a mixed batch may have; it has at least as many rows as the batch.
    """
    rows, length = batch["input_ids"].shape
    lanes = [(name, row) for name in names for row in range(rows)]
    size = max(rows, most // length)
    for start in range(0, len(lanes), size):
        chosen = lanes[start : start + size]
        index = torch.tensor([row for _, row in chosen], device=batch["input_ids"].device)
        part: dict[str, Any] = {key: value[index] for key, value in batch.items()}
        yield part | {"adapter_names": [name for name, _ in chosen]}
