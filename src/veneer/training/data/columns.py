"""Columns under other names, such as ``prompt=question,completion=answer``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...errors import ConfigError, DataError, Hint
from ...wording import did_you_mean, listed
from .files import Found
from .forms import FORMS

#: Every column that some form reads.
KNOWN = tuple(dict.fromkeys(name for form in FORMS for name in (*form.columns, *form.more)))


def parse_columns(text: str) -> dict[str, str]:
    """Read pairs such as ``prompt=question``: name of a column here -> its name in the data.

    Raises:
        ConfigError: Some pairs are none, or name a column that no form has; lists all of them.
    """
    found: dict[str, str] = {}
    wrong = []
    for pair in text.split(","):
        name, _, column = (part.strip() for part in pair.partition("="))
        if not name or not column:
            wrong.append(f"{pair.strip()!r} is no pair such as prompt=question")
        elif name not in KNOWN:
            near = f" (did you mean {column}={name}?)" if column in KNOWN else did_you_mean(name, KNOWN)
            wrong.append(f"{name!r} is no column that is read{near or ': those are ' + ', '.join(KNOWN)}")
        elif name in found:
            wrong.append(f"{name!r} is given twice")
        else:
            found[name] = column
    if wrong:
        raise ConfigError(Hint("columns"), f": {'; '.join(wrong)}")
    return found


def renamed(found: Sequence[Found], columns: Mapping[str, str], source: str) -> list[Found]:
    """Records with columns under the names of the forms; what had such a name before gives way.

    Args:
        found: Places and records.
        columns: Name of a column here -> its name in the records.
        source: Where they come from.

    Raises:
        DataError: No record has one of the columns; names the nearest ones.
    """
    there = dict.fromkeys(name for _, record in found if isinstance(record, Mapping) for name in record)
    absent = [column for column in columns.values() if column not in there]
    if absent and there:
        lacks = ", ".join(f"{column!r}{did_you_mean(column, there)}" for column in absent)
        raise DataError(
            Hint("columns"), f": {source} has no column {lacks}. It has {listed(map(repr, there), 12)}"
        )
    return [
        (place, _renamed(record, columns) if isinstance(record, Mapping) else record)
        for place, record in found
    ]


def _renamed(record: Mapping[str, object], columns: Mapping[str, str]) -> dict[str, object]:
    moved = {name: record[column] for name, column in columns.items() if column in record}
    gone = {*columns, *columns.values()}
    return {name: value for name, value in record.items() if name not in gone} | moved
