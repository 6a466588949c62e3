"""Recognising the form of records by their columns, and saying what is wrong with those of no form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

from ...errors import DataError, Hint, Text
from ...wording import nearest
from .forms import FORMS, PURPOSES, Form, Purpose, Record
from .problems import Unfit, read_all
from .values import kind_of

#: What to say about data that is for another purpose.
ELSEWHERE: dict[Purpose, str | Text] = {
    "sft": "that is data for fine-tuning on answers, not for this",
    "dpo": Text("that is preference data", Hint("method", "dpo", ": train on it with {}")),
    "kto": Text("those are answers that are good or bad", Hint("method", "kto", ": train on them with {}")),
    "classification": "that is data for a classifier, not for this",
    "prompt": "there are prompts, but no answers to learn from",
}


def form_of(records: Sequence[object], purpose: Purpose = "sft") -> Form:
    """The form of most records; of two equally frequent ones, the first in `FORMS`.

    Args:
        records: At least one.
        purpose: ``sft``, ``dpo``, ``kto``, ``classification`` or ``prompt``.

    Raises:
        DataError: No record has a form for the purpose; names the columns found and the nearest right ones.
    """
    return common_form([(f"record {n}", record) for n, record in enumerate(records, start=1)], purpose)


def common_form(found: Sequence[tuple[str, object]], purpose: Purpose, source: str = "the data") -> Form:
    """As `form_of`, for records with their places.

    Raises:
        DataError: There is no such purpose, no record has a form for it, or there are no records.
    """
    if purpose not in PURPOSES:
        raise DataError(f"the purpose of data is one of {', '.join(PURPOSES)}, not {purpose!r}")
    count = Counter(form for _, record in found if (form := _first_fit(record, purpose)) is not None)
    if not count:
        read_all(found, partial(_refuse, purpose), source)
        raise DataError(f"{source} holds no records")
    return max(FORMS, key=lambda form: count[form])


def read_as(form: Form, record: object) -> dict[str, Any]:
    """Read a record in plain words.

    Raises:
        Unfit: The record does not have the form.
    """
    if isinstance(record, Mapping) and form.fits(record):
        return form.read(record)
    other = _first_fit(record, form.purpose)
    if other is not None:
        raise Unfit(f"it has the {other}, the others have the {form}; one set of data has one form")
    _refuse(form.purpose, record)


def _first_fit(record: object, purpose: Purpose) -> Form | None:
    if not isinstance(record, Mapping):
        return None
    return next((form for form in FORMS if form.purpose == purpose and form.fits(record)), None)


def _refuse(purpose: Purpose, record: object) -> NoReturn:
    """Say what is wrong with the columns of a record that has no form for a purpose."""
    if isinstance(record, Unfit):  # there is none: the line of the file is broken
        raise record
    forms = ", ".join(form.example for form in FORMS if form.purpose == purpose)
    way_out = Text(f"Understood: {forms}", Hint("columns", clause=". {} renames columns"))
    if not isinstance(record, Mapping):
        raise Unfit(f"it is no object but {kind_of(record)}", way_out=way_out)
    columns = ", ".join(repr(name) for name in record) or "no column"
    hints = _hints(record, purpose)
    more = (" (", Text.join("; ", hints), ")") if hints else ()
    raise Unfit(f"it lacks columns that are needed: it has {columns}", *more, way_out=way_out)


def _hints(record: Record, purpose: Purpose) -> list[str | Text]:
    columns = {column for form in FORMS if form.purpose == purpose for column in form.columns}
    null = [f"{name!r} is null" for name in record if name in columns and record[name] is None]
    others = (other for other in PURPOSES if other != purpose and _first_fit(record, other) is not None)
    return [*near_columns(record, columns), *null] or [ELSEWHERE[other] for other in others][:1]


def near_columns(record: Record, columns: Collection[str]) -> list[str]:
    """Which columns of a record may be misspelt."""
    absent = [column for column in columns if column not in record]
    unknown = [name for name in record if name not in set(columns)]
    near = ((name, nearest(str(name).strip(), absent, cutoff=0.7)) for name in unknown)
    return [f"{name!r} should perhaps be {close[0]!r}" for name, close in near if close]
