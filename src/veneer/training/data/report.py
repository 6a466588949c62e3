"""What a run would train on: encoded examples, their lengths, what is cut, duplicates."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median
from typing import TYPE_CHECKING, Any

from ...forward import IGNORED
from ...wording import listed, some
from ..console import paragraphs
from .batch import Row
from .encoding import Encoded, count, each, laid_out
from .labels import EncodedLabels
from .records import Records
from .rows import Rows, encode_records, longest_example

if TYPE_CHECKING:
    from rich.text import Text

#: A piece of an example's text, and whether it counts in the loss.
Piece = tuple[str, bool]
BAR, BUCKETS = 40, 12
#: Characters of a piece that are shown.
LONGEST = 1200


@dataclass(frozen=True)
class DataReport:
    """What a run would train on.

    Attributes:
        records: The records.
        encoded: Their rows, as `veneer train` makes them.
        shown: The first few examples, each in pieces.
        cut: Places of the records that are longer than the maximum length.
        duplicates: Places of the records that are alike, for each that occurs more than once.
    """

    records: Records
    encoded: Rows
    shown: list[list[Piece]]
    cut: list[str]
    duplicates: list[list[str]]

    def lines(self) -> list[str]:
        """Lengths as a histogram, what is cut, and duplicates."""
        lengths, longest = self.encoded.lengths, self.encoded.max_length
        lines = [
            f"Tokens of an example: {min(lengths):,} at least, {median(lengths):,.0f} in the median, "
            f"{max(lengths):,} at most",
            *histogram(lengths),
            "",
        ]
        if self.cut:
            lines.append(f"Longer than {longest:,} tokens, and cut there: {listed(self.cut, 8)}")
        else:
            lines.append(f"Nothing is cut at {longest:,} tokens")
        again = sum(len(places) - 1 for places in self.duplicates)
        if again:
            alike = (" = ".join(map(str, some(places, 3))) for places in self.duplicates)
            lines.append(f"{count(again, 'duplicate')}: {listed(alike, 5)}")
        else:
            lines.append("No duplicates")
        return lines

    def as_json(self) -> dict[str, Any]:
        """All of it, for JSON."""
        lengths = self.encoded.lengths
        found: dict[str, Any] = {
            "data": self.records.source,
            "form": self.records.form.name,
            "records": len(self.records),
            "examples": len(self.encoded.rows),
            "max_length": self.encoded.max_length,
            "lengths": {"least": min(lengths), "median": median(lengths), "most": max(lengths)},
            "cut": self.cut,
            "duplicates": self.duplicates,
            "shown": [
                [{"text": text, "counted": counted} for text, counted in pieces] for pieces in self.shown
            ],
        }
        if isinstance(self.encoded, Encoded):
            found |= {"tokens": self.encoded.tokens, "counted_tokens": self.encoded.learned}
        return found


def report(
    records: Records, tokenizer: Any, max_length: int, method: str = "sft", shown: int = 3
) -> DataReport:
    """Encode records as `veneer train` does, and look at them.

    Args:
        records: From `read_records`.
        tokenizer: Of the model.
        max_length: Maximum length of an example, in tokens; a model may take less.
        method: As in `veneer train`.
        shown: Number of examples to show.

    Raises:
        DataError: The records cannot be used, as in training.
    """
    encoded = encode_records(records, tokenizer, longest_example(tokenizer, max_length), method)
    return DataReport(
        records,
        encoded,
        [list(_pieces(row, encoded, tokenizer)) for row in encoded.rows[:shown]],
        [records.where(n) for n, length in enumerate(encoded.lengths) if length > encoded.max_length],
        _duplicates(records),
    )


def legend(in_colour: bool) -> str:
    """How `written` shows what counts in the loss."""
    return f"{'Green' if in_colour else 'Between [[ and ]]'}: what counts in the loss."


def written(pieces: Sequence[Piece], in_colour: bool) -> Text:
    """An example; what counts in the loss is green, or in brackets where there are no colours."""
    whole = paragraphs("")
    for text, counted in pieces:
        if len(text) > LONGEST:
            left_out = f" … {len(text) - LONGEST:,} characters … "
            text = text[: LONGEST // 2] + left_out + text[-LONGEST // 2 :]
        piece = paragraphs(text if in_colour or not counted else f"[[{text}]]")
        if in_colour:
            piece.stylize("green" if counted else "dim")
        whole.append_text(piece)
    return whole


def histogram(lengths: Sequence[int]) -> list[str]:
    """A heading, and a line with a bar for each range of lengths."""
    least, most = min(lengths), max(lengths)
    widths = (factor * 10**power for power in range(10) for factor in (1, 2, 5))
    width = next(width for width in widths if most // width - least // width < BUCKETS)
    found = Counter(length // width for length in lengths)
    highest = max(found.values())
    lines = [f"  {'tokens':>16}  {'examples':>8}"]
    for bucket in range(least // width, most // width + 1):
        name = f"{bucket * width:,}" + (f" to {(bucket + 1) * width - 1:,}" if width > 1 else "")
        bar = "█" * -(-found[bucket] * BAR // highest)
        lines.append(f"  {name:>16}  {found[bucket]:>8,}  {bar}".rstrip())
    return lines


def _pieces(row: dict[str, Any], encoded: Rows, tokenizer: Any) -> Iterator[Piece]:
    if isinstance(encoded, Encoded):
        yield from _runs(row, tokenizer)
    elif isinstance(encoded, EncodedLabels):
        yield tokenizer.decode(row["input_ids"]), False
        yield f" → {encoded.label_names[row['labels']]}", True
    else:
        prompt = _laid_out(row, "", tokenizer)
        yield prompt, False
        for side in ("chosen", "rejected", "completion"):
            if side in row:
                yield f"\n{side if 'label' not in row else 'good' if row['label'] else 'bad'}: ", False
                yield _laid_out(row, side, tokenizer).removeprefix(prompt), True


def _runs(row: Row, tokenizer: Any) -> Iterator[Piece]:
    # The first token of a row is predicted from nothing.
    labels = [IGNORED, *row["labels"][1:]]
    tokens = zip(row["input_ids"], labels, strict=True)
    for counted, run in groupby(tokens, key=lambda token: token[1] != IGNORED):
        yield tokenizer.decode([token for token, _ in run]), counted


def _laid_out(row: dict[str, Any], side: str, tokenizer: Any) -> str:
    if isinstance(row["prompt"], str):
        return str(row["prompt"] + (row[side] if side else ""))
    return laid_out(tokenizer, row["prompt"] + (row[side] if side else []), answer_next=not side)


def _duplicates(records: Records) -> list[list[str]]:
    """Places of records that mean the same; columns that are not used may differ."""
    places: dict[str, list[str]] = {}
    meanings = each(records, records.form.purpose, lambda example, form: json.dumps(example, sort_keys=True))
    for number, meaning in enumerate(meanings):
        places.setdefault(meaning, []).append(records.where(number))
    return [alike for alike in places.values() if len(alike) > 1]
