"""Packing: several examples in one row, none of which attends to another."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import DataError, TrainingError
from ...forward import IGNORED, bare, without_cache
from ..forward import evaluating
from .batch import Collator, Row, Separation


@dataclass(frozen=True)
class Packed:
    """Packed rows.

    Attributes:
        rows: ``input_ids``, ``labels`` and ``position_ids``, which start at 0 with every example.
        examples: Number of examples in the rows.
        max_length: Maximum length of a row.
    """

    rows: list[Row]
    examples: int
    max_length: int

    def lines(self) -> list[str]:
        """What to say about it."""
        tokens = sum(len(row["input_ids"]) for row in self.rows)
        return [
            f"{self.examples} examples packed into {len(self.rows)} rows of at most {self.max_length} tokens "
            f"({tokens / (len(self.rows) * self.max_length):.0%} full)"
        ]


def pack(rows: Sequence[Row], max_length: int = 1024) -> Packed:
    """Join whole examples into rows, the longest first, each where it leaves the least room.

    The first token of an example has no loss: it follows the end of another example.

    Args:
        rows: From `encode`, none longer than ``max_length``.
        max_length: Maximum length of a packed row.

    Raises:
        DataError: An example is longer than a row.

    Source: best-fit decreasing, as for packing in "Fewer Truncations Improve Language Modeling" (Ding et al.
    2024, arXiv:2404.10830, section 3), which splits what is longer than a row before.
    """
    longest = max((len(row["input_ids"]) for row in rows), default=0)
    if longest > max_length:
        raise DataError(f"an example of {longest} tokens does not fit into a packed row of {max_length}")
    room: list[tuple[int, int]] = []  # (tokens left, row), in order
    packed: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
        length = len(row["input_ids"])
        place = bisect.bisect_left(room, (length, -1))
        left, number = room.pop(place) if place < len(room) else (max_length, len(packed))
        if number == len(packed):
            packed.append([])
        packed[number].append(row)
        bisect.insort(room, (left - length, number))
    return Packed([_joined(part) for part in packed], len(rows), max_length)


def _joined(rows: Sequence[Row]) -> Row:
    joined: Row = {"input_ids": [], "labels": [], "position_ids": []}
    for row in rows:
        joined["input_ids"] += row["input_ids"]
        joined["labels"] += [IGNORED, *row["labels"][1:]]
        joined["position_ids"] += range(len(row["input_ids"]))
    return joined


@torch.no_grad()
def packing_for(model: Any) -> Separation:
    """How to keep packed examples apart in a model: by ``position_ids`` alone, or by a mask too.

    Tried on the model with two short examples in a row: changing the first must not change the logits of the
    second, which must be the same as without the first.

    Args:
        model: A causal language model of transformers, adapted or not.

    Raises:
        TrainingError: Neither keeps them apart.
    """
    with evaluating(model):
        for way in ("position_ids", "mask"):
            if _separates(model, Collator(0, way)):
                return way
    raise TrainingError(
        f"{type(bare(model)).__name__} cannot keep packed examples apart: it lets each see those before "
        "it, whether told by position_ids or by a mask. Train without packing."
    )


def _separates(model: Any, collator: Collator) -> bool:
    first, other, second = [1] * 3, [2] * 3, [3, 4, 5, 6]
    rows = [{"input_ids": part, "labels": part} for part in (first, other, second)]
    try:
        after_first, after_other, alone = (
            _last_logits(model, collator, pack_of) for pack_of in (rows[::2], rows[1:], rows[2:])
        )
    except (TypeError, ValueError, RuntimeError):  # a model without such an argument
        return False
    scale = float(alone.abs().max())
    near = float((after_first - alone).abs().max()) <= 0.05 * scale
    return near and torch.equal(after_first, after_other)


def _last_logits(model: Any, collator: Collator, rows: Sequence[Row]) -> torch.Tensor:
    batch = collator([_joined(rows)])
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
    logits: torch.Tensor = model(**inputs, **without_cache(model)).logits
    return logits[0, -len(rows[-1]["input_ids"]) :].float()
