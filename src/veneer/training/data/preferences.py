"""Records of answers that were preferred or not -> rows of TRL's trainers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .encoding import Lengths, count, each, has_template, laid_out
from .forms import Form, Purpose, Record
from .messages import as_messages
from .problems import Unfit


@dataclass(frozen=True, kw_only=True)
class Preferences(Lengths):
    """Pairs of answers, or answers with a judgement; lengths are those of a prompt and its longest answer.

    Attributes:
        rows: ``prompt``, ``chosen`` and ``rejected``, or ``prompt``, ``completion`` and ``label``: lists of
            messages if the tokenizer has a chat template, else texts.
        left_out: Whether records that are too long are not among the rows, as a reward is one of a whole
            answer.
    """

    rows: list[dict[str, Any]]
    left_out: bool = False

    def lines(self) -> list[str]:
        """What to say about it."""
        labels = [row["label"] for row in self.rows if "label" in row]
        lines = [f"{count(len(self.rows), 'pair')} of answers"]
        if labels:
            good = sum(labels)
            lines = [f"{count(len(labels), 'answer')}: {good} good, {len(labels) - good} bad"]
            if good in (0, len(labels)):
                lines.append("warning: all answers are judged alike, so there is nothing to tell apart")
        return lines + self.about_cut("answer" if labels else "pair", "left out" if self.left_out else "cut")


def encode_preferences(
    records: Sequence[Record], tokenizer: Any, max_length: int = 1024, method: str = "dpo"
) -> Preferences:
    """Lay out answers as the model will see them in generation.

    With a chat template, a prompt that is a text becomes a turn of the user, as in `encode` and `prompt_ids`.

    Args:
        records: From `read_records` with the purpose ``dpo``, or ``kto`` for that method, or mappings of such
            a form.
        tokenizer: Of transformers.
        max_length: Maximum length of prompt and answer together, in tokens.
        method: ``dpo``, ``orpo``, ``kto`` or ``reward``, which leaves out what is longer.

    Raises:
        DataError: Some records cannot be laid out; one error for all of them.
    """
    purpose: Purpose = "kto" if method == "kto" else "dpo"
    found = each(records, purpose, lambda example, form: _row(example, form, tokenizer))
    left_out = method == "reward"
    rows = [row for row, length in found if not (left_out and length > max_length)]
    lengths = [length for _, length in found]
    return Preferences(rows=rows, left_out=left_out, lengths=lengths, max_length=max_length)


def _row(example: dict[str, Any], form: Form, tokenizer: Any) -> tuple[dict[str, Any], int]:
    """(the row, tokens of its longest answer with the prompt)."""
    answers = [name for name in ("chosen", "rejected", "completion") if name in example]
    texts = {name: example[name] for name in ("prompt", *answers)}
    row = example
    if has_template(tokenizer):
        prompt = as_messages(example["prompt"])
        row = {**example, "prompt": prompt}
        row |= {name: as_messages(example[name], "assistant") for name in answers}
        sides = [laid_out(tokenizer, prompt + row[name]) for name in answers]
    elif all(isinstance(part, str) for part in texts.values()):
        sides = [example["prompt"] + example[name] for name in answers]
    else:
        raise Unfit(
            "the tokenizer has no chat template, so messages cannot be laid out; give texts, or "
            "take a chat model"
        )
    return row, max(len(tokenizer(side, add_special_tokens=False)["input_ids"]) for side in sides)
