"""How good a model answers: loss of the right answers, and the answers it gives itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .data import Collator, Row
from .losses import loss_sum
from .progress import Progress, Silent


@torch.no_grad()
def answer_loss(
    model: Any,
    rows: Sequence[Row],
    collator: Collator,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> float:
    """Mean negative log-likelihood of an answer's token (natural logarithm)."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    total, count = 0.0, 0
    with (progress or Silent()).bar("held-out loss", len(rows)) as advance:
        for start in range(0, len(ordered), batch_size):
            chosen = ordered[start : start + batch_size]
            batch = {name: value.to(device) for name, value in collator(chosen).items()}
            part, tokens = loss_sum(model, batch)
            total, count = total + part.item(), count + int(tokens)
            advance(len(chosen), "")
    model.train(was_training)
    return total / count


def valid_json(answer: str) -> bool:
    """Whether an answer is one JSON object and nothing else."""
    try:
        return isinstance(json.loads(answer), dict)
    except (ValueError, RecursionError):
        return False


def exact_match(answer: str, expected: Mapping[str, Any]) -> bool:
    """Whether an answer is one JSON object with exactly these keys and values."""
    return valid_json(answer) and json.loads(answer) == dict(expected)
