"""Measure an adapted model and its base on data: loss, perplexity, exact match, accuracy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from .data import Collator, Form, LabelCollator, Records, encode, encode_classification, pad_token
from .data.encoding import each, last_turn, prompt_tokens
from .evaluate import answer_loss
from .forward import batches, evaluating
from .generation import Sampling, generate_answers
from .losses import Classes
from .progress import Progress, Silent


@dataclass(frozen=True)
class Score:
    """The measures of one model.

    Attributes:
        loss: Mean negative log-likelihood of an answer's token, or of the right class (natural logarithm).
        perplexity: ``exp(loss)`` of a language model; None where it is too large for a float.
        exact: Number of answers that equal the expected text, without surrounding space.
        correct: Number of correct classes.
    """

    loss: float
    perplexity: float | None = None
    exact: int | None = None
    correct: int | None = None


@dataclass(frozen=True)
class Comparison:
    """The measures of an adapter and of its base.

    Attributes:
        adapter: With the adapter.
        base: Without it; None for a classifier, whose head belongs to the adapter.
        examples: Number of examples.
        tokens: Number of tokens with a loss, for a language model.
        asked: Number of answers compared for exact match.
        commonest: Share of the most frequent class, which guessing reaches.
        notes: Lines about the data.
    """

    adapter: Score
    base: Score | None
    examples: int
    tokens: int | None = None
    asked: int | None = None
    commonest: float | None = None
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """All measures, for JSON."""
        whole = {name: value for name, value in asdict(self).items() if name != "notes" and value is not None}
        for name in ("base", "adapter"):
            if name in whole:
                whole[name] = {measure: value for measure, value in whole[name].items() if value is not None}
        return whole

    def table(self) -> list[tuple[str, str, str]]:
        """Rows of (measure, reference, adapter); the reference is the base, or guessing for a classifier."""
        if self.base is None:
            guess, right = f"{self.commonest:.1%}", self.adapter.correct or 0
            share = f"{right}/{self.examples} ({right / self.examples:.1%})"
            return [("accuracy", guess, share), ("loss", "", f"{self.adapter.loss:.4f}")]
        both = (self.base, self.adapter)
        rows = [
            ("loss", *(f"{score.loss:.4f}" for score in both)),
            ("perplexity", *(_short(score.perplexity) for score in both)),
        ]
        if self.asked:
            rows.append(
                (
                    "exact match",
                    *(f"{s.exact}/{self.asked} ({(s.exact or 0) / self.asked:.1%})" for s in both),
                )
            )
        return [(name, base, adapter) for name, base, adapter in rows]


def _short(perplexity: float | None) -> str:
    if perplexity is None:
        return "too large"
    return f"{perplexity:.2f}" if perplexity < 1e6 else f"{perplexity:.2e}"


def compare(
    model: Any,
    tokenizer: Any,
    records: Records,
    *,
    max_length: int = 1024,
    batch_size: int = 8,
    exact_match: bool = True,
    progress: Progress | None = None,
) -> Comparison:
    """Loss, perplexity and exact match of an adapted language model and of its base.

    Exact match is about the last answer of a record, generated without drawing. It may be one token longer
    than the longest expected answer; a longer one cannot match.

    Args:
        model: From `load_adapted`.
        tokenizer: Its tokenizer.
        records: Read with the purpose ``sft``.
        max_length: Maximum length of an example for the loss, in tokens.
        batch_size: Examples in a batch.
        exact_match: Generate answers too, which takes longest; plain text has none.
        progress: Where to report.

    Raises:
        DataError: Records that cannot be laid out; one error for all of them.
    """
    encoded = encode(records, tokenizer, max_length)
    turns = [turn for turn in each(records, "sft", partial(_asked, tokenizer=tokenizer)) if turn is not None]
    prompts, wanted = [prompt for prompt, _ in turns] if exact_match else [], [answer for _, answer in turns]
    longest = max((len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in wanted), default=0)
    progress = Silent() if progress is None else progress
    scores = []
    for name in ("base", "adapter"):
        with evaluating(model, base=name == "base"):
            progress.say(f"Measuring the {name}")
            loss = answer_loss(model, encoded.rows, Collator(pad_token(tokenizer)), batch_size, progress)
            exact = None
            if prompts:
                sampling = Sampling(max_new_tokens=longest + 1)
                answers = generate_answers(
                    model, tokenizer, prompts, sampling=sampling, batch_size=batch_size, progress=progress
                )
                exact = sum(a.strip() == b for a, b in zip(answers, wanted, strict=True))
            scores.append(Score(loss, perplexity_of(loss), exact))
    return Comparison(
        adapter=scores[1],
        base=scores[0],
        examples=len(encoded.rows),
        tokens=encoded.learned,
        asked=len(prompts) or None,
        notes=tuple(encoded.lines()),
    )


def _asked(example: dict[str, Any], form: Form, tokenizer: Any) -> tuple[list[int], str] | None:
    turn = last_turn(example)
    if turn is None:
        return None
    prompt, answer = turn
    return prompt_tokens(prompt, tokenizer, form.separator), answer.strip()


def perplexity_of(loss: float) -> float | None:
    """exp(loss), None where that is too large for a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return None


@torch.no_grad()
def accuracy(
    model: Any,
    tokenizer: Any,
    records: Records,
    label_names: Sequence[str],
    *,
    max_length: int = 512,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Comparison:
    """Loss and accuracy of an adapted classifier.

    Args:
        model: From `load_adapted`.
        tokenizer: Its tokenizer.
        records: Read with the purpose ``classification``.
        label_names: Names of the classes, by number.
        max_length: Maximum length of a text, in tokens.
        batch_size: Texts in a batch.
        progress: Where to report.

    Raises:
        DataError: Records that cannot be used, or classes that the model does not know.
    """
    encoded = encode_classification(records, tokenizer, max_length, label_names)
    classes, rows = Classes(LabelCollator(pad_token(tokenizer))), encoded.rows
    loss, correct = 0.0, 0
    with evaluating(model):
        for batch in batches(model, rows, classes.collator, batch_size, progress, "texts"):
            part, outputs = classes.loss(model, batch)
            loss += part.item()
            correct += int((outputs["logits"].argmax(-1) == batch["labels"]).sum())
    commonest = max(Counter(row["labels"] for row in rows).values()) / len(rows)
    return Comparison(
        adapter=Score(loss / len(rows), correct=correct),
        base=None,
        examples=len(rows),
        commonest=commonest,
        notes=tuple(encoded.lines()),
    )
