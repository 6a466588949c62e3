"""Losses of a family: of the tokens of language models, or any function of a model's output.

A loss of tokens is a function of their log-probabilities ``l`` under the adapter that is trained::

    cross_entropy            -l
    importance_sampling      -exp(l - q) · advantage
    ppo                      -min(ρ · advantage, clip(ρ, 1 - low, 1 + high) · advantage),  ρ = exp(l - q)

``q`` are the log-probabilities under which the tokens were sampled.

Source: PPO, arXiv:1707.06347, equation 7.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from veneer.errors import DataError, UnknownOptionError
from veneer.family.batches import Batch
from veneer.forward import IGNORED
from veneer.wording import listed

#: (log-probabilities, what the loss needs of the batch at the same tokens, options) -> a loss for each token.
TokenLoss = Callable[..., Tensor]
#: (output of the model for the rows of one adapter, its batch) -> the loss, or (sum, what it is a sum over).
ModelLoss = Callable[[Any, Batch], Tensor | tuple[Tensor, int | Tensor]]


@dataclass(frozen=True)
class Result:
    """What `Family.forward_backward` says of one adapter.

    Attributes:
        loss: The mean over what the loss counts: tokens, for a loss of tokens.
        count: How much it counts.
        logprobs: Log-probability of each label under the adapter, 0 where there is none: (rows, length). None
            for a loss of the caller's.
    """

    loss: float
    count: float
    logprobs: Tensor | None = field(default=None, repr=False)


def cross_entropy(logprobs: Tensor, given: Mapping[str, Tensor]) -> Tensor:
    """Negative log-likelihood."""
    return -logprobs


def importance_sampling(logprobs: Tensor, given: Mapping[str, Tensor]) -> Tensor:
    """The policy gradient of tokens that were sampled under ``logprobs`` of the batch."""
    return -(logprobs - given["logprobs"]).exp() * given["advantages"]


def ppo(logprobs: Tensor, given: Mapping[str, Tensor], low: float = 0.2, high: float = 0.2) -> Tensor:
    """The clipped objective of PPO."""
    ratio, advantages = (logprobs - given["logprobs"]).exp(), given["advantages"]
    return -torch.minimum(ratio * advantages, ratio.clamp(1.0 - low, 1.0 + high) * advantages)


#: The losses of tokens, and what each needs of a batch besides ``labels``, at the same places.
TOKEN_LOSSES: dict[str, tuple[TokenLoss, tuple[str, ...]]] = {
    "cross_entropy": (cross_entropy, ()),
    "importance_sampling": (importance_sampling, ("logprobs", "advantages")),
    "ppo": (ppo, ("logprobs", "advantages")),
}


def check_loss(loss: str | ModelLoss, options: Mapping[str, Any], batches: Mapping[str, Batch]) -> None:
    """Refuse a loss that cannot be computed on these batches.

    Raises:
        UnknownOptionError: There is no loss of that name.
        DataError: Listing every batch that lacks what the loss needs.
    """
    if not isinstance(loss, str):
        if options:
            raise UnknownOptionError(f"options ({listed(options)}) are for the losses of tokens")
        return
    if loss not in TOKEN_LOSSES:
        raise UnknownOptionError(f"no loss is called {loss!r}; there are {listed(TOKEN_LOSSES)}")
    problems = []
    for name, batch in batches.items():
        needed = ("labels", *TOKEN_LOSSES[loss][1])
        if missing := [key for key in needed if key not in batch]:
            problems.append(f"{name!r} lacks {listed(missing)}")
            continue
        shapes = {key: tuple(batch[key].shape) for key in ("input_ids", *needed) if key in batch}
        if len(set(shapes.values())) > 1 or len(shapes["labels"]) != 2:
            problems.append(f"{name!r}: one shape (rows, length) for all is needed, got {shapes}")
    if problems:
        raise DataError(f"the loss {loss!r} cannot be computed: {'; '.join(problems)}")


def loss_of_caller(loss: ModelLoss, output: Any, batch: Batch) -> tuple[Tensor, Tensor | int, None]:
    """The loss of one adapter's rows, and what it is a sum over.

    Raises:
        DataError: The model gives nothing that has rows.
    """
    if output is None:
        raise DataError(
            "the model's output has no row for each of the batch, so a function cannot be computed for one "
            "adapter alone: return a tensor whose first dimension is that of the input"
        )
    found = loss(output, batch)
    total, count = found if isinstance(found, tuple) else (found, 1)
    return total, count, None


def label_logprobs(logits: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
    """Log-probability of each label, 0 where there is none, of the rows of all adapters at once.

    Args:
        logits: (rows, positions, vocabulary): of the tokens before those that are predicted.
        labels: (rows, length).
        positions: The places of ``labels[:, 1:]`` that the logits predict.

    Returns:
        (rows, positions), float32.
    """
    targets = labels[:, 1:][:, positions].to(logits.device)
    return -torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(targets.shape)


def token_loss(
    loss: str, options: Mapping[str, Any], logprobs: Tensor, positions: Tensor, batch: Batch
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of one adapter's rows.

    Args:
        loss: Its name.
        options: Of the loss.
        logprobs: (rows, positions), as of `label_logprobs`.
        positions: The places of ``labels[:, 1:]`` that they are of, ascending.
        batch: Of the adapter, filled up or not.

    Returns:
        (sum over the counted tokens, their number, log-probabilities like ``labels``).
    """
    function, needed = TOKEN_LOSSES[loss]
    labels = batch["labels"].to(logprobs.device)
    inside = int((positions < labels.shape[1] - 1).sum())  # the first ones: they ascend
    kept, logprobs = positions[:inside], logprobs[:, :inside]
    counted = labels[:, 1:][:, kept] != IGNORED
    # Values where nothing counts may be anything, and would make the gradient no number.
    given = {key: torch.where(counted, batch[key].to(logprobs.device)[:, 1:][:, kept], 0.0) for key in needed}
    total = function(logprobs, given, **options).sum()  # 0 where nothing counts
    full = logprobs.new_zeros(labels.shape)
    full[:, kept + 1] = logprobs.detach()
    return total, counted.sum(), full
