"""Measures of answers: loss of the right ones, and checks of generated ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .data import IGNORED, Collator, Row
from .forward import batches, evaluating, mixed
from .losses import Answers, Objective, row_losses
from .progress import Progress


@torch.no_grad()
def answer_loss(
    model: Any,
    rows: Sequence[Row],
    collator: Collator,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> float:
    """Mean negative log-likelihood of an answer's token (natural logarithm)."""
    return objective_loss(model, rows, Answers(collator), batch_size, progress)


@torch.no_grad()
def objective_loss(
    model: Any,
    rows: Sequence[Any],
    objective: Objective,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> float:
    """Mean of what an objective sums, over the labels that it counts."""
    total, count = 0.0, 0
    with evaluating(model):
        for batch in batches(model, rows, objective.collator, batch_size, progress, "held-out loss"):
            total += objective.loss(model, batch)[0].item()
            count += int((batch["labels"] != IGNORED).sum())
    return total / count


@torch.no_grad()
def answer_losses(
    model: Any,
    rows: Sequence[Row],
    collator: Collator,
    names: Sequence[str],
    batch_size: int = 8,
    *,
    most: int,
    progress: Progress | None = None,
) -> dict[str, float]:
    """`answer_loss` of several adapters of a model by their names, in mixed batches of ``most`` tokens."""
    totals, count = dict.fromkeys(names, 0.0), 0
    with evaluating(model):
        for batch in batches(model, rows, collator, batch_size, progress, "held-out loss"):
            count += int((batch["labels"][:, 1:] != IGNORED).sum())
            for part in mixed(batch, names, most):
                for name, loss in zip(part["adapter_names"], row_losses(model, part).tolist(), strict=True):
                    totals[name] += loss
    return {name: total / count for name, total in totals.items()}


def valid_json(answer: str) -> bool:
    """Whether an answer is one JSON object and nothing else."""
    try:
        return isinstance(json.loads(answer), dict)
    except (ValueError, RecursionError):
        return False


def exact_match(answer: str, expected: Mapping[str, Any]) -> bool:
    """Whether an answer is one JSON object with exactly these keys and values."""
    return valid_json(answer) and json.loads(answer) == dict(expected)
