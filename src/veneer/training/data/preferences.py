"""Records with a better and a worse answer -> rows of TRL's DPOTrainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .encoding import count, each, has_template, laid_out, longer
from .forms import Form, Record
from .messages import as_messages
from .problems import Unfit


@dataclass(frozen=True)
class Preferences:
    """Pairs of answers.

    Attributes:
        rows: ``prompt``, ``chosen`` and ``rejected``: lists of messages if the tokenizer has a chat template,
            else texts.
        cut: Number of pairs in which prompt and answer exceed the maximum length.
        max_length: The maximum length, at which the trainer cuts.
    """

    rows: list[dict[str, Any]]
    cut: int = 0
    max_length: int = 1024

    def lines(self) -> list[str]:
        """What to say about it."""
        lines = [f"{count(len(self.rows), 'pair')} of answers"]
        if self.cut:
            lines.append(f"warning: {longer(self.cut, 'pair', self.max_length)}; such are cut")
        return lines


def encode_preferences(records: Sequence[Record], tokenizer: Any, max_length: int = 1024) -> Preferences:
    """Lay out pairs of answers as the model will see them in generation.

    With a chat template, a prompt that is a text becomes a turn of the user, as in `encode` and `prompt_ids`.

    Args:
        records: From `read_records` with the purpose ``dpo``, or mappings of a form of preferences.
        tokenizer: Of transformers.
        max_length: Maximum length of prompt and answer together, in tokens.

    Raises:
        DataError: Some records cannot be laid out; one error for all of them.
    """
    found = list(each(records, "dpo", lambda example, form: _pair(example, form, tokenizer)))
    rows = [row for row, _ in found]
    return Preferences(rows, sum(length > max_length for _, length in found), max_length)


def _pair(example: dict[str, Any], form: Form, tokenizer: Any) -> tuple[dict[str, Any], int]:
    """(the pair, tokens of the longer side)."""
    if has_template(tokenizer):
        pair = {
            "prompt": as_messages(example["prompt"]),
            "chosen": as_messages(example["chosen"], "assistant"),
            "rejected": as_messages(example["rejected"], "assistant"),
        }
        sides = [laid_out(tokenizer, pair["prompt"] + pair[side]) for side in ("chosen", "rejected")]
    elif all(isinstance(part, str) for part in example.values()):
        pair = example
        sides = [example["prompt"] + example[side] for side in ("chosen", "rejected")]
    else:
        raise Unfit(
            "the tokenizer has no chat template, so messages cannot be laid out; give texts, or "
            "take a chat model"
        )
    return pair, max(len(tokenizer(side, add_special_tokens=False)["input_ids"]) for side in sides)
