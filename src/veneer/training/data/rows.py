"""Records -> rows to train on, whatever they were read for, and rows set aside for validation."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

from ...errors import DataError, Hint
from .encoding import Encoded, count, encode
from .labels import EncodedLabels, encode_classification
from .preferences import Preferences, encode_preferences
from .records import Records

T = TypeVar("T")
Rows = Encoded | EncodedLabels | Preferences


def encode_records(
    records: Records,
    tokenizer: Any,
    max_length: int,
    method: str = "sft",
    label_names: Sequence[str] | None = None,
) -> Rows:
    """Tokenise records for the purpose that they were read for.

    Args:
        records: From `read_records`.
        tokenizer: Of transformers.
        max_length: Maximum length of an example, in tokens; see `longest_example`.
        method: ``sft``, or one that learns from preferences.
        label_names: The classes of a classifier, if they are known already.

    Raises:
        DataError: Some records cannot be laid out, or nothing is left to learn.
    """
    if records.form.purpose == "classification":
        return encode_classification(records, tokenizer, max_length, label_names)
    if method == "sft":
        return encode(records, tokenizer, max_length)
    return encode_preferences(records, tokenizer, max_length, method)


def longest_example(tokenizer: Any, max_length: int) -> int:
    """The maximum length of an example, in tokens: the one asked for, or what the model takes."""
    return min(getattr(tokenizer, "model_max_length", max_length), max_length)


def set_aside(rows: Sequence[T], share: float, seed: int) -> tuple[list[T], list[T]]:
    """Draw rows for validation; the same number of rows and the same seed give the same places.

    Returns:
        (rows to train on, rows for validation), both in their order.

    Raises:
        DataError: Nothing would be left to train on.
    """
    number = max(1, round(share * len(rows)))
    if number >= len(rows):
        raise DataError(
            Hint("validation_split", share),
            f" of {count(len(rows), 'example')} leaves nothing to train on: take a smaller share",
        )
    chosen = set(random.Random(seed).sample(range(len(rows)), number))
    parts: tuple[list[T], list[T]] = ([], [])
    for place, row in enumerate(rows):
        parts[place in chosen].append(row)
    return parts
