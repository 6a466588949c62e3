"""How good a model answers: loss of the right answers, and the answers it gives itself."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .chunks import chunked_loss
from .data import IGNORED, Collator, Row, bare, without_cache
from .progress import Progress, Silent


def loss_sum(model: Any, batch: Mapping[str, Tensor], *, chunk: int = 0) -> tuple[Tensor, Tensor]:
    """Sum of the negative log-likelihood of a batch's answers, and the number of their tokens.

    Logits are computed only where some row of the batch has an answer: for a short answer to a long prompt
    that is most of the work and of the memory of a large vocabulary.

    Args:
        model: A causal language model of transformers, adapted or not; also inside a data-parallel wrapper.
        batch: ``input_ids``, ``attention_mask``, ``labels``: (rows, length); labels are -100 for no loss.
        chunk: Tokens whose logits are computed at a time, see `chunked_loss`; 0 is all.

    Returns:
        (sum, count), both scalars; the sum is of float32 and carries gradients.
    """
    if chunk:
        return chunked_loss(model, batch, chunk)
    labels = batch["labels"][:, 1:]
    inputs = {name: value for name, value in batch.items() if name != "labels"} | without_cache(model)
    keep = (labels != IGNORED).any(dim=0).nonzero().squeeze(1)
    if _keeps_logits(model):
        logits = model(**inputs, logits_to_keep=keep).logits
    else:
        logits = model(**inputs).logits[:, keep]
    targets = labels[:, keep]
    total = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total, (targets != IGNORED).sum()


def _keeps_logits(model: Any) -> bool:
    return "logits_to_keep" in inspect.signature(bare(model).forward).parameters


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
