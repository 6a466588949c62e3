"""Measure an adapted model and its base on data: loss, perplexity, exact match, accuracy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..peft_model import PeftModel
from ..routing import BASE
from .data import Collator, Form, LabelCollator, Records, Row, encode, encode_classification, pad_token
from .data.encoding import each, last_turn, prompt_tokens
from .evaluate import answer_loss, answer_losses
from .forward import batches, evaluating, mixed
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
    """The measures of adapters and of their base, or of a model without an adapter.

    Attributes:
        scores: ``base`` and ``adapter``; ``adapter`` alone for a classifier, whose head is the adapter's;
            ``model`` for a model without an adapter; of several adapters, the ``base`` alone.
        examples: Number of examples.
        tokens: Number of tokens with a loss, for a language model.
        asked: Number of answers compared for exact match.
        commonest: Share of the most frequent class, which guessing reaches.
        notes: Lines about the data.
        adapters: Several adapters, by what they are called.
    """

    scores: Mapping[str, Score]
    examples: int
    tokens: int | None = None
    asked: int | None = None
    commonest: float | None = None
    notes: tuple[str, ...] = ()
    adapters: Mapping[str, Score] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """All measures, for JSON."""
        names = ("examples", "tokens", "asked", "commonest")
        whole = {name: value for name in names if (value := getattr(self, name)) is not None}
        adapters = {"adapters": _measures(self.adapters)} if self.adapters else {}
        return whole | _measures(self.scores) | adapters

    def table(self) -> list[tuple[str, ...]]:
        """Rows of a measure and its values; the first row names what was measured, guessing among it.

        Of several adapters, each has a row, and the measures are the columns.
        """
        rows = self._by_measure()
        return list(zip(*rows, strict=True)) if self.adapters else rows

    def _by_measure(self) -> list[tuple[str, ...]]:
        named = {**self.scores, **self.adapters}
        scores = named.values()
        losses = [f"{score.loss:.4f}" for score in scores]
        if self.commonest is not None:
            return [
                ("", "guessing", *named),
                ("accuracy", f"{self.commonest:.1%}", *(_of(s.correct, self.examples) for s in scores)),
                ("loss", "", *losses),
            ]
        rows = [
            ("", *named),
            ("loss", *losses),
            ("perplexity", *(_short(score.perplexity) for score in scores)),
        ]
        if self.asked:
            rows.append(("exact match", *(_of(score.exact, self.asked) for score in scores)))
        return rows


def _measures(scores: Mapping[str, Score]) -> dict[str, dict[str, Any]]:
    return {
        name: {measure: value for measure, value in asdict(score).items() if value is not None}
        for name, score in scores.items()
    }


def _of(count: int | None, all: int) -> str:
    return f"{count}/{all} ({(count or 0) / all:.1%})"


def _short(perplexity: float | None) -> str:
    if perplexity is None:
        return "too large"
    return f"{perplexity:.2f}" if perplexity < 1e6 else f"{perplexity:.2e}"


@dataclass(frozen=True)
class _Asked:
    tokenizer: Any
    rows: Sequence[Row]
    prompts: Sequence[list[int]]
    wanted: Sequence[str]
    sampling: Sampling
    batch_size: int
    progress: Progress

    @property
    def collator(self) -> Collator:
        return Collator(pad_token(self.tokenizer))

    def score(self, loss: float, answers: Sequence[str]) -> Score:
        right = sum(a.strip() == b for a, b in zip(answers, self.wanted, strict=True)) if answers else None
        return Score(loss, perplexity_of(loss), right)


def compare(
    model: Any,
    tokenizer: Any,
    records: Records,
    *,
    max_length: int = 1024,
    batch_size: int = 8,
    exact_match: bool = True,
    labels: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Loss, perplexity and exact match of adapters of a language model and of its base, or of a plain one.

    Exact match is about the last answer of a record, generated without drawing. It may be one token longer
    than the longest expected answer; a longer one cannot match.

    Args:
        model: From `load_adapted` or `load_plain`.
        tokenizer: Its tokenizer.
        records: Read with the purpose ``sft``.
        max_length: Maximum length of an example for the loss, in tokens.
        batch_size: Examples in a batch.
        exact_match: Generate answers too, which takes longest; plain text has none.
        labels: Measure these adapters of the model together with the base, in mixed batches that have no more
            tokens than ``batch_size`` examples of ``max_length``: by name, what to call each.
        progress: Where to report.

    Raises:
        DataError: Records that cannot be laid out; one error for all of them.
    """
    encoded = encode(records, tokenizer, max_length)
    turns = [turn for turn in each(records, "sft", partial(_asked, tokenizer=tokenizer)) if turn is not None]
    prompts, wanted = [prompt for prompt, _ in turns] if exact_match else [], [answer for _, answer in turns]
    longest = max((len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in wanted), default=0)
    progress = Silent() if progress is None else progress
    sampling = Sampling(max_new_tokens=longest + 1)
    asked = _Asked(tokenizer, encoded.rows, prompts, wanted, sampling, batch_size, progress)
    if labels is None:
        scores, adapters = _one_by_one(model, asked), {}
    else:
        found = _together(model, asked, [BASE, *labels], batch_size * max_length)
        scores = {"base": found[BASE]}
        adapters = {label: found[name] for name, label in labels.items()}
    return Comparison(
        scores,
        examples=len(encoded.rows),
        tokens=encoded.learned,
        asked=len(prompts) or None,
        notes=tuple(encoded.lines()),
        adapters=adapters,
    )


def _one_by_one(model: Any, asked: _Asked) -> dict[str, Score]:
    scores = {}
    for name in ("base", "adapter") if isinstance(model, PeftModel) else ("model",):
        with evaluating(model, base=name == "base"):
            asked.progress.say(f"Measuring the {name}")
            loss = answer_loss(model, asked.rows, asked.collator, asked.batch_size, asked.progress)
            answers = _answers(model, asked) if asked.prompts else []
            scores[name] = asked.score(loss, answers)
    return scores


def _together(model: Any, asked: _Asked, names: Sequence[str], most: int) -> dict[str, Score]:
    asked.progress.say(f"Measuring the base and {len(names) - 1} adapters, in mixed batches")
    losses = answer_losses(
        model, asked.rows, asked.collator, names, asked.batch_size, most=most, progress=asked.progress
    )
    count = len(asked.prompts)
    answers = []
    if count:
        length = max(map(len, asked.prompts)) + asked.sampling.max_new_tokens
        rows = max(asked.batch_size, min(asked.batch_size * len(names), most // length))
        answers = _answers(model, replace(asked, batch_size=rows), names)
    parts = {name: answers[i * count : (i + 1) * count] for i, name in enumerate(names)}
    return {name: asked.score(losses[name], parts[name]) for name in names}


def _answers(model: Any, asked: _Asked, names: Sequence[str] = ()) -> list[str]:
    """The model's answers, or those of each of its adapters, one adapter after another."""
    return generate_answers(
        model,
        asked.tokenizer,
        [*asked.prompts] * max(1, len(names)),
        sampling=asked.sampling,
        batch_size=asked.batch_size,
        progress=asked.progress,
        adapter_names=[name for name in names for _ in asked.prompts] or None,
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
    labels: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Loss and accuracy of a classifier, adapted or plain, or of several adapters.

    Args:
        model: From `load_adapted` or `load_plain`.
        tokenizer: Its tokenizer.
        records: Read with the purpose ``classification``.
        label_names: Names of the classes, by number.
        max_length: Maximum length of a text, in tokens.
        batch_size: Texts in a batch.
        labels: As in `compare`.
        progress: Where to report.

    Raises:
        DataError: Records that cannot be used, or classes that the model does not know.
    """
    encoded = encode_classification(records, tokenizer, max_length, label_names)
    classes, rows = Classes(LabelCollator(pad_token(tokenizer))), encoded.rows
    names = list(labels or ("adapter" if isinstance(model, PeftModel) else "model",))
    losses, correct = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    with evaluating(model):
        for batch in batches(model, rows, classes.collator, batch_size, progress, "texts"):
            for part in mixed(batch, names, batch_size * max_length) if labels else [batch]:
                logits, truth = classes.loss(model, part)[1]["logits"], part["labels"]
                each_loss = nn.functional.cross_entropy(logits, truth, reduction="none").tolist()
                right = (logits.argmax(-1) == truth).tolist()
                owners = part.get("adapter_names") or names * len(truth)
                for name, loss, good in zip(owners, each_loss, right, strict=True):
                    losses[name] += loss
                    correct[name] += good
    scores = {name: Score(losses[name] / len(rows), correct=correct[name]) for name in names}
    commonest = max(Counter(row["labels"] for row in rows).values()) / len(rows)
    return Comparison(
        {} if labels else scores,
        examples=len(rows),
        commonest=commonest,
        notes=tuple(encoded.lines()),
        adapters={label: scores[name] for name, label in (labels or {}).items()},
    )
