"""The loss of a language model without all of its logits: the head runs on some tokens at a time.

Logits of T tokens and a vocabulary of V take 4·T·V bytes, several times over; here 4·c·V with c tokens a
chunk, whose logits are computed once more for the gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import Hint, TrainingError
from ..inject.embeddings import embedding_of
from .data import IGNORED, bare, without_cache


def chunked_loss(model: Any, batch: Mapping[str, Tensor], chunk: int) -> tuple[Tensor, Tensor]:
    """Sum of the negative log-likelihood of a batch's answers, and the number of their tokens.

    The model runs whole, but its head is given no token; what would have gone into the head is caught, and
    the tokens that have a loss go through the head ``chunk`` at a time.

    Args:
        model: A causal language model of transformers that passed `check_chunks`; also inside a data-parallel
            wrapper.
        batch: ``input_ids``, ``attention_mask``, ``labels``: (rows, length); labels are -100 for no loss.
        chunk: Tokens a chunk.

    Returns:
        (sum, count), both scalars; the sum is of float32 and carries gradients.
    """
    labels = batch["labels"][:, 1:]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    head = _head(model)
    hidden = _into_head(model, head, inputs)[:, :-1]
    counted = labels != IGNORED
    kept, targets = hidden[counted], labels[counted]

    def part(tokens: Tensor, wanted: Tensor) -> Tensor:
        return nn.functional.cross_entropy(head(tokens).float(), wanted, reduction="sum")

    # Without any token the sum is an empty one, but still of the graph.
    total = kept.float().sum() * 0
    for tokens, wanted in zip(torch.split(kept, chunk), torch.split(targets, chunk), strict=True):
        if len(tokens):
            total = total + checkpoint(part, tokens, wanted, use_reentrant=False)
    return total, counted.sum()


def check_chunks(model: Any) -> None:
    """Refuse a model whose logits are not simply what its head makes of the hidden states.

    Some models bound or scale their logits after the head, which the chunks would leave out.

    Raises:
        TrainingError: It is such a model, or it has no head of its own.
    """
    head = _head(model)
    was_training = model.training
    model.eval()
    ids = torch.arange(1, 5, device=next(model.parameters()).device)[None]
    told: list[Tensor] = []

    def large(module: nn.Module, given: Any, made: Tensor) -> Tensor:
        """Numbers that a bound would not leave alone, in place of what the head made."""
        told.append(torch.linspace(-500, 500, made.numel(), device=made.device).to(made).view_as(made))
        return told[-1]

    handle = head.register_forward_hook(large)
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, **without_cache(model)).logits
    finally:
        handle.remove()
        model.train(was_training)
    if len(told) != 1 or not torch.equal(logits.float(), told[0].float()):
        raise TrainingError(
            f"{type(bare(model)).__name__} does not give the logits that its head makes as they are, so "
            "its loss cannot be computed in chunks: leave out ",
            Hint("loss_chunk_size"),
        )


def _head(model: Any) -> nn.Module:
    head = embedding_of(bare(model), "output")
    if head is None:
        raise TrainingError(
            f"{type(bare(model)).__name__} has no head that makes logits of hidden states: leave out ",
            Hint("loss_chunk_size"),
        )
    return head


def _into_head(model: Any, head: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The hidden states (rows, length, width) that the head would have been given."""
    caught: list[Tensor] = []

    def catch(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        caught.append(given[0])
        return (given[0][:, :0], *given[1:])

    handle = head.register_forward_pre_hook(catch)
    try:
        model(**inputs, **without_cache(model))
    finally:
        handle.remove()
    (hidden,) = caught
    return hidden
