"""What a row is trained for: the answer's tokens, or a class. Sums, so that any split of a batch adds up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .data import IGNORED
from .evaluate import loss_sum

Batch = Mapping[str, Tensor]
Collate = Callable[[Sequence[Any]], dict[str, Tensor]]


class Objective(Protocol):
    """How a batch is made and what is asked of the model."""

    @property
    def collator(self) -> Collate:
        """Rows -> a batch."""

    def count(self, batch: Batch) -> Tensor:
        """How many things of the batch loss falls on."""

    def blank(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row without anything that loss falls on."""

    def sums(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        """``loss``, carrying gradients, and further measures, each summed over what `count` counts."""


@dataclass(frozen=True)
class Answers:
    """Next tokens of the answers.

    Attributes:
        collator: Rows -> a batch.
        chunk: Tokens whose logits are computed at a time; 0 is all.
    """

    collator: Collate
    chunk: int = 0

    def count(self, batch: Batch) -> Tensor:
        """Tokens of the answers; the first of a row is predicted from nothing."""
        return (batch["labels"][:, 1:] != IGNORED).sum()

    def blank(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row with no loss on any token."""
        return {**row, "labels": [IGNORED] * len(row["labels"])}

    def sums(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        """``loss``: negative log-likelihood of the answers."""
        return {"loss": loss_sum(model, batch, chunk=self.chunk)[0]}


@dataclass(frozen=True)
class Classes:
    """The class of each row.

    Attributes:
        collator: Rows -> a batch.
    """

    collator: Collate

    def count(self, batch: Batch) -> Tensor:
        """Rows that have a class."""
        return (batch["labels"] != IGNORED).sum()

    def blank(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row without its class."""
        return {**row, "labels": IGNORED}

    def sums(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        """``loss``: cross entropy; ``accuracy``: rows whose likeliest class is theirs."""
        labels = batch["labels"]
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs).logits.float()
        loss = nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        return {"loss": loss, "accuracy": (logits.argmax(-1) == labels).sum()}


@torch.no_grad()
def evaluate(
    model: Any,
    rows: Sequence[Any],
    objective: Objective,
    batch_size: int,
    asked_to_stop: Callable[[], bool] = bool,
) -> dict[str, float] | None:
    """Means over all rows, those of one process or, in a distributed run, of all of them.

    Draws no random numbers, so training goes on as if it had not been. Rows of similar length go together.

    Returns:
        Measure -> mean, or None if it was asked to stop before the end.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    spread = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if spread else (0, 1)
    mine = sorted(rows, key=lambda row: len(row["input_ids"]))[rank::world]
    totals: dict[str, Tensor] = {}
    try:
        # Each process takes part in the sum below, so one without rows asks for a measure of a blank one.
        for start in range(0, max(len(mine), 1), batch_size):
            if asked_to_stop():
                return None
            chosen = mine[start : start + batch_size] or [objective.blank(rows[0])]
            batch = {name: value.to(device) for name, value in objective.collator(chosen).items()}
            parts = {"count": objective.count(batch), **objective.sums(model, batch)}
            for name, part in parts.items():
                totals[name] = totals.get(name, torch.zeros((), dtype=torch.float64)) + part.double().cpu()
    finally:
        model.train(was_training)
    names = sorted(totals)
    sums = torch.stack([totals[name] for name in names])
    if spread:
        sums = sums.to(device)
        torch.distributed.all_reduce(sums)
    values = dict(zip(names, sums.tolist(), strict=True))
    count = values.pop("count")
    return {name: value / count for name, value in values.items()}
