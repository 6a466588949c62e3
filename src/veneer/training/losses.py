"""Training objectives: the loss of a batch, with logits only at the tokens of answers.

For a short answer to a long prompt, the logits take most of the memory and much of the time of a step. In
chunks of c tokens, the logits of T answer tokens and a vocabulary of V take 4·c·V bytes instead of 4·T·V, and
are computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import Hint, TrainingError
from ..forward import IGNORED, answer_logits, bare, without_cache
from ..inject.base_tensors import embedding_of
from .forward import evaluating

Batch = Mapping[str, Tensor]
Collate = Callable[[Sequence[Any]], dict[str, Tensor]]


class Objective(Protocol):
    """Makes batches of rows, and their loss."""

    @property
    def collator(self) -> Collate:
        """Rows -> a batch; its ``labels`` are -100 where no loss falls."""

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """(sum of the losses, with gradients; further outputs, with a row for each row of the batch)."""


@dataclass(frozen=True)
class Answers:
    """Language modelling on the tokens of answers.

    Attributes:
        collator: Rows -> a batch.
        chunk: Tokens whose logits are computed at a time; 0 is all.
    """

    collator: Collate
    chunk: int = 0

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The negative log-likelihood of the answers."""
        return loss_sum(model, batch, chunk=self.chunk)[0], {}


@dataclass(frozen=True)
class Classes:
    """Classification of whole rows.

    Attributes:
        collator: Rows -> a batch.
    """

    collator: Collate

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy, and the ``logits`` (rows, classes)."""
        output = model(**_inputs(batch))
        return class_loss(output, batch)[0], {"logits": output.logits.float()}


@dataclass(frozen=True)
class Preferred:
    """Answers that were preferred or not, learned by one of TRL's trainers.

    Attributes:
        method: ``dpo``, ``kto``, ``orpo`` or ``reward``.
        beta: How strongly the model is kept near its start or, for ORPO, the weight of the preference.
        max_length: Longest prompt and answer, in tokens; None cuts nothing.
    """

    method: str
    beta: float
    max_length: int | None


def class_loss(output: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Sum of the cross entropy of a classifier's rows, and their number."""
    labels = batch["labels"]
    total = nn.functional.cross_entropy(output.logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    return total, (labels != IGNORED).sum()


def loss_sum(model: Any, batch: Batch, *, chunk: int = 0) -> tuple[Tensor, Tensor]:
    """Sum of the negative log-likelihood of a batch's answers, and the number of their tokens.

    Args:
        model: A causal language model of transformers, adapted or not; also inside a data-parallel wrapper.
        batch: ``input_ids``, ``attention_mask``, ``labels``: (rows, length); labels are -100 for no loss.
        chunk: Tokens whose logits are computed at a time, in a model that passed `check_chunks`; 0 is all.

    Returns:
        (sum, count), both scalars; the sum is of float32 and carries gradients.
    """
    if chunk:
        return _chunked(model, batch, batch["labels"][:, 1:], chunk)
    total, targets = _cross_entropy(model, batch, "sum")
    return total, (targets != IGNORED).sum()


def row_losses(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """The sum of `loss_sum` for each row by itself: (rows,). A mixed batch includes its ``adapter_names``."""
    losses, targets = _cross_entropy(model, batch, "none")
    return losses.view_as(targets).sum(dim=1)


def _cross_entropy(model: Any, batch: Mapping[str, Any], reduction: str) -> tuple[Tensor, Tensor]:
    """(losses, the labels that they are about, of those places where some row has one)."""
    logits, places = answer_logits(model, _inputs(batch) | without_cache(model), batch["labels"])
    targets = batch["labels"][:, 1:][:, places]
    losses = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction=reduction
    )
    return losses, targets


def _inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "labels"}


def _chunked(model: Any, batch: Batch, labels: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Run the model with its head on no token at all, then the head on chunks of the answers' tokens."""
    head = head_of(model)
    hidden = into_head(model, head, _inputs(batch))[:, :-1]
    counted = labels != IGNORED
    return chunked_sum(head, hidden[counted], labels[counted], chunk), counted.sum()


def chunked_sum(head: nn.Module, hidden: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """Sum of the cross entropy of tokens; the logits of a chunk are computed again in the backward pass.

    Args:
        head: Makes logits.
        hidden: (tokens, width).
        targets: (tokens,).
        chunk: Tokens whose logits exist at a time.
    """

    def part(tokens: Tensor, wanted: Tensor) -> Tensor:
        return nn.functional.cross_entropy(head(tokens).float(), wanted, reduction="sum")

    total = hidden[:0].float().sum()  # without any token it is 0, but still of the graph
    for tokens, wanted in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True):
        if len(tokens):
            total = total + checkpoint(part, tokens, wanted, use_reentrant=False)
    return total


def check_chunks(model: Any) -> None:
    """Refuse a model that has no output head, or changes its logits after it, by scaling or bounding them."""
    head = head_of(model)
    ids = torch.arange(1, 5, device=next(model.parameters()).device)[None]
    made: list[Tensor] = []

    def large(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """Replace the head's output by numbers that a bound would change."""
        made.append(
            torch.linspace(-500, 500, output.numel(), device=output.device).to(output).view_as(output)
        )
        return made[-1]

    with head.register_forward_hook(large), torch.no_grad(), evaluating(model):
        logits = model(input_ids=ids, **without_cache(model)).logits
    if len(made) != 1 or not torch.equal(logits.float(), made[0].float()):
        raise TrainingError(
            f"{type(bare(model)).__name__} changes the logits after its head, so its loss cannot be "
            "computed in chunks: leave out ",
            Hint("loss_chunk_size"),
        )


def head_of(model: Any) -> nn.Module:
    """The module that makes logits of hidden states."""
    head = embedding_of(bare(model), "output")
    if head is None:
        raise TrainingError(
            f"{type(bare(model)).__name__} has no head that turns hidden states into logits: leave out ",
            Hint("loss_chunk_size"),
        )
    return head


def into_head(model: Any, head: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The hidden states (rows, length, width) in front of the head."""
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        caught.append(args[0])
        return (args[0][:, :0], *args[1:])

    with head.register_forward_pre_hook(catch):
        model(**inputs, **without_cache(model))
    (hidden,) = caught
    return hidden
