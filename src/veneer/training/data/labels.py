"""Records with text and label -> rows of a classifier."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import DataError
from ...wording import did_you_mean
from .encoding import Lengths, count, each
from .forms import Record
from .problems import Unfit


@dataclass(frozen=True, kw_only=True)
class EncodedLabels(Lengths):
    """Rows of a classifier.

    Attributes:
        rows: ``input_ids`` and ``labels`` (the number of the class) of each example.
        label_names: Names of the classes, by number.
    """

    rows: list[dict[str, Any]]
    label_names: list[str]

    def lines(self) -> list[str]:
        """Lines for the user: the number of examples of each class, and what was cut."""
        found = Counter(row["labels"] for row in self.rows)
        shown = [f"{name} {found[number]}" for number, name in enumerate(self.label_names)][:8]
        more = f", … ({len(self.label_names)} classes)" if len(self.label_names) > 8 else ""
        return [f"{count(len(self.rows), 'example')}: {', '.join(shown)}{more}", *self.about_cut()]


def encode_classification(
    records: Sequence[Record],
    tokenizer: Any,
    max_length: int = 512,
    label_names: Sequence[str] | None = None,
) -> EncodedLabels:
    """Tokenise texts and number their labels.

    Args:
        records: From `read_records` with the purpose ``classification``, or mappings with ``text`` (or
            ``sentence``) and ``label``.
        tokenizer: Of transformers.
        max_length: Maximum length of a text, in tokens.
        label_names: The classes of a model. By default those of the records' source or else the labels found,
            sorted. A number as a label is the number of a class if names are known, else a name itself.

    Raises:
        DataError: Labels are partly texts and partly numbers, there are fewer than two classes, or a label is
            not among ``label_names``.
    """
    examples = each(records, "classification", lambda example, form: example)
    told = label_names if label_names is not None else getattr(records, "label_names", None)
    names = list(told) if told is not None else _names(examples)
    if len(names) < 2:
        raise DataError(f"a classifier needs two classes or more; all labels are {names[0]!r}")
    numbers = {name: number for number, name in enumerate(names)}
    rows, lengths = [], []
    labels = each(records, "classification", lambda example, form: _number(example["label"], numbers))
    for example, label in zip(examples, labels, strict=True):
        ids = list(tokenizer(example["text"])["input_ids"])
        lengths.append(len(ids))
        if len(ids) > max_length:
            ids = list(tokenizer(example["text"], truncation=True, max_length=max_length)["input_ids"])
        rows.append({"input_ids": ids, "labels": label})
    return EncodedLabels(rows=rows, label_names=names, lengths=lengths, max_length=max_length)


def _names(examples: Sequence[Record]) -> list[str]:
    kinds = {type(example["label"]) for example in examples}
    if len(kinds) > 1:
        raise DataError("some labels are texts and some numbers: write all in one way")
    return [str(label) for label in sorted({example["label"] for example in examples})]


def _number(label: str | int, numbers: dict[str, int]) -> int:
    """The number of a class, by name or number; `Unfit` if there is none."""
    if str(label) in numbers:
        return numbers[str(label)]
    if isinstance(label, int) and 0 <= label < len(numbers):
        return label
    known = list(numbers)[:8]
    raise Unfit(
        f"label {label!r} is no class that is known: {', '.join(known)}{did_you_mean(label, numbers)}"
    )
