"""How good a model answers: loss of the right answers, and the answers it gives itself."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .chunks import chunked_loss
from .data import IGNORED, Collator, Row, without_cache
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
    model = getattr(model, "module", model)  # inside DistributedDataParallel
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


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


@torch.no_grad()
def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    temperature: float = 0.0,
    progress: Progress | None = None,
) -> list[str]:
    """What the model answers to tokenised prompts, batched with padding on the left.

    Args:
        model: A causal language model of transformers, adapted or not.
        tokenizer: Its tokenizer.
        prompts: Token ids of each prompt.
        max_new_tokens: Longest answer.
        batch_size: Prompts at a time, those of similar length together.
        temperature: 0 takes the likeliest token at each step.
        progress: Where to report.

    Returns:
        The answers in the order of the prompts, without special tokens.
    """
    from transformers import GenerationConfig

    from .data import pad_token

    was_training = model.training
    model.eval()
    device, pad = next(model.parameters()).device, pad_token(tokenizer)
    own = getattr(model, "generation_config", None)
    settings: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        settings["temperature"] = temperature
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        bos_token_id=getattr(own, "bos_token_id", None),
        eos_token_id=getattr(own, "eos_token_id", None) or tokenizer.eos_token_id,
        **settings,
    )
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    with (progress or Silent()).bar("answers", len(prompts)) as advance:
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            longest = max(len(prompts[place]) for place in places)
            gaps = [longest - len(prompts[place]) for place in places]
            ids = torch.tensor(
                [[pad] * gap + prompts[place] for gap, place in zip(gaps, places, strict=True)]
            )
            mask = torch.tensor([[0] * gap + [1] * (longest - gap) for gap in gaps])
            out = model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
            )
            for place, text in zip(
                places, tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True), strict=True
            ):
                answers[place] = text
            advance(len(places), "")
    model.train(was_training)
    return answers


def valid_json(answer: str) -> bool:
    """Whether an answer is one JSON object and nothing else."""
    try:
        return isinstance(json.loads(answer), dict)
    except (ValueError, RecursionError):
        return False


def exact_match(answer: str, expected: Mapping[str, Any]) -> bool:
    """Whether an answer is one JSON object with exactly these keys and values."""
    return valid_json(answer) and json.loads(answer) == dict(expected)
