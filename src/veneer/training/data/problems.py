"""What is wrong with records: an error for each, and one for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from ...errors import DataError, Text

T = TypeVar("T")
R = TypeVar("R")
SHOWN = 3


class Unfit(DataError):
    """One record is wrong; `read_all` collects these into one `DataError`.

    Args:
        parts: What is wrong.
        way_out: What to do about it, said once for all records.
    """

    def __init__(self, *parts: str | Text, way_out: str | Text = "") -> None:
        super().__init__(*parts)
        self.way_out = way_out


def read_all(found: Sequence[tuple[str, T]], read: Callable[[T], R], source: str) -> list[R]:
    """Apply a function to each record.

    Args:
        found: The place of each record, such as ``line 7``, and the record.
        read: Raises `Unfit` for a record that is wrong.
        source: Where they come from.

    Raises:
        DataError: Some are wrong: their number, the first few, and the ways out.
    """
    made: list[R] = []
    problems: list[tuple[str, Unfit]] = []
    for place, record in found:
        try:
            made.append(read(record))
        except Unfit as error:
            problems.append((place, error))
    if not problems:
        return made
    alike: dict[Text, list[str]] = {}
    for place, problem in problems:
        alike.setdefault(problem.message, []).append(place)
    total = f"{len(found)} {'record' if len(found) == 1 else 'records'}"
    lines: list[str | Text] = [f"{len(problems)} of {total} of {source} cannot be used:"]
    for words, places in list(alike.items())[:SHOWN]:
        others = f" (and {len(places) - 1} more like it)" if len(places) > 1 else ""
        lines.append(Text(f"  {places[0]}: ", words, others))
    if len(alike) > SHOWN:
        lines.append(f"  … and {sum(map(len, list(alike.values())[SHOWN:]))} more")
    ways_out = dict.fromkeys(problem.way_out for _, problem in problems if problem.way_out)
    raise DataError(Text.join("\n", [*lines, *ways_out]))
