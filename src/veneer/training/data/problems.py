"""What is wrong with records: an error for each, and one message for all of them."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import DataError, Text

#: (place, what is wrong) of a bad record.
Problem = tuple[str, "str | Text"]
SHOWN = 3


class Unfit(DataError):
    """One record is wrong; readers of many records collect these into one `DataError`."""


def problem_list(problems: Sequence[Problem], total: int, source: str, way_out: str | Text = "") -> Text:
    """One message for all bad records: their number, the first few, and a way out.

    Args:
        problems: (place, problem) of each bad record.
        total: Number of all records.
        source: Where they come from.
        way_out: A last line.
    """
    alike: dict[str | Text, list[str]] = {}
    for place, words in problems:
        alike.setdefault(words, []).append(place)
    lines: list[str | Text] = [
        f"{len(problems)} of {total} {'record' if total == 1 else 'records'} of {source} cannot be used:"
    ]
    for words, places in list(alike.items())[:SHOWN]:
        others = f" (and {len(places) - 1} more like it)" if len(places) > 1 else ""
        lines.append(Text(f"  {places[0]}: ", words, others))
    if len(alike) > SHOWN:
        rest = sum(len(places) for places in list(alike.values())[SHOWN:])
        lines.append(f"  … and {rest} more")
    return Text.join("\n", [*lines, *([way_out] if way_out else [])])
