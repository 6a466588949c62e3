"""Rows of tokens -> batches of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...forward import IGNORED

Row = dict[str, list[int]]
Separation = Literal["position_ids", "mask"]


@dataclass(frozen=True)
class Collator:
    """Rows -> a batch padded at its right end to the longest row.

    Attributes:
        pad: Padding token; it is masked, so any one will do.
        packed: What keeps the examples of packed rows apart, see `packing_for`.
    """

    pad: int
    packed: Separation = "position_ids"

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Make a batch: ``input_ids`` and ``labels`` (rows, longest), and what tokens may attend to.

        For plain rows that is ``attention_mask`` (rows, longest); for packed rows ``position_ids`` (rows,
        longest), which start at 0 with every example; if ``packed`` is ``mask``, there is also an
        ``attention_mask`` (rows, 1, longest, longest), which is added to the scores.
        """
        batch = _inputs(rows, self.pad)
        # The first token of a row is predicted from nothing.
        batch["labels"] = _filled([[IGNORED, *row["labels"][1:]] for row in rows], IGNORED)
        if "position_ids" not in rows[0]:
            return batch
        # The padding is one more example, so nothing attends to it and no mask is needed.
        del batch["attention_mask"]
        longest = batch["labels"].shape[1]
        batch["position_ids"] = torch.tensor(
            [[*row["position_ids"], *range(longest - len(row["position_ids"]))] for row in rows]
        )
        if self.packed == "mask":
            batch["attention_mask"] = block_mask(batch["position_ids"])
        return batch


def block_mask(position_ids: Tensor) -> Tensor:
    """The causal mask of packed rows: 0 within an example, the lowest float elsewhere.

    Args:
        position_ids: (rows, length), starting at 0 with every example.

    Returns:
        (rows, 1, length, length), float32.
    """
    example = (position_ids == 0).cumsum(-1)
    allowed = (example[:, :, None] == example[:, None, :]).tril()
    mask = torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(torch.float32).min)
    return mask[:, None]


@dataclass(frozen=True)
class LabelCollator:
    """Rows of a classifier -> a batch padded at its right end.

    Attributes:
        pad: Padding token.
    """

    pad: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``: (rows, longest); ``labels``: (rows,)."""
        return {**_inputs(rows, self.pad), "labels": torch.tensor([row["labels"] for row in rows])}


def _inputs(rows: Sequence[Mapping[str, Any]], pad: int) -> dict[str, Tensor]:
    ids = [row["input_ids"] for row in rows]
    return {"input_ids": _filled(ids, pad), "attention_mask": _filled([[1] * len(row) for row in ids], 0)}


def _filled(values: Sequence[Sequence[int]], filler: int) -> Tensor:
    longest = max(map(len, values))
    return torch.tensor([[*v, *[filler] * (longest - len(v))] for v in values])


def pad_token(tokenizer: Any) -> int:
    """The padding token of a tokenizer, or what can stand for one."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
