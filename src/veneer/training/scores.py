"""Measure an adapted model and its base on data: loss, perplexity, exact match, accuracy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from ..peft_model import PeftModel
from .data import Collator, Form, LabelCollator, Records, encode, encode_classification, pad_token
from .data.encoding import each, last_turn, prompt_tokens
from .evaluate import answer_loss
from .forward import batches, evaluating
from .generation import generate_answers
from .losses import Classes
from .progress import Progress, Silent
from .sampling import Sampling


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
    """The measures of an adapter and of its base, or of a model without an adapter.

    Attributes:
        scores: ``base`` and ``adapter``; ``adapter`` alone for a classifier, whose head is the adapter's;
            ``model`` for a model without an adapter.
        examples: Number of examples.
        tokens: Number of tokens with a loss, for a language model.
        asked: Number of answers compared for exact match.
        commonest: Share of the most frequent class, which guessing reaches.
        notes: Lines about the data.
    """

    scores: Mapping[str, Score]
    examples: int
    tokens: int | None = None
    asked: int | None = None
    commonest: float | None = None
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """All measures, for JSON."""
        whole = {
            name: value
            for name, value in asdict(self).items()
            if name not in ("scores", "notes") and value is not None
        }
        return whole | {
            name: {measure: value for measure, value in asdict(score).items() if value is not None}
            for name, score in self.scores.items()
        }

    def table(self) -> list[tuple[str, ...]]:
        """Rows of a measure and its values; the first row names what was measured, guessing among it."""
        scores = self.scores.values()
        rows: list[tuple[str, ...]]
        if self.commonest is not None:
            rows = [
                ("", "guessing", *self.scores),
                ("accuracy", f"{self.commonest:.1%}", *(_of(s.correct, self.examples) for s in scores)),
                ("loss", "", *(f"{score.loss:.4f}" for score in scores)),
            ]
            return rows
        rows = [
            ("", *self.scores),
            ("loss", *(f"{score.loss:.4f}" for score in scores)),
            ("perplexity", *(_short(score.perplexity) for score in scores)),
        ]
        if self.asked:
            rows.append(("exact match", *(_of(score.exact, self.asked) for score in scores)))
        return rows


def _of(count: int | None, all: int) -> str:
    return f"{count}/{all} ({(count or 0) / all:.1%})"


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
    """Loss, perplexity and exact match of an adapted language model and of its base, or of a plain one.

    Exact match is about the last answer of a record, generated without drawing. It may be one token longer
    than the longest expected answer; a longer one cannot match.

    Args:
        model: From `load_adapted` or `load_plain`.
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
    scores = {}
    for name in ("base", "adapter") if isinstance(model, PeftModel) else ("model",):
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
            scores[name] = Score(loss, perplexity_of(loss), exact)
    return Comparison(
        scores,
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
    """Loss and accuracy of a classifier, adapted or plain.

    Args:
        model: From `load_adapted` or `load_plain`.
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
        {"adapter" if isinstance(model, PeftModel) else "model": Score(loss / len(rows), correct=correct)},
        examples=len(rows),
        commonest=commonest,
        notes=tuple(encoded.lines()),
    )
