"""Read one file: JSONL, JSON, CSV, TSV or Parquet."""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ...errors import DataError
from ...wording import first_line, listed
from ..libraries import require
from .forms import FORMS
from .problems import Unfit
from .values import read_json

#: A place, such as ``line 7``, and the record there or the `Unfit` that says why there is none.
Found = tuple[str, Any]
#: The contents of a source, and the names of the classes in its columns, where it has them.
Source = tuple[list[Found], dict[str, list[str]]]
#: Suffixes of texts without records.
TEXTS = (".txt", ".md", ".rst", ".log")


def check_type(place: Path) -> None:
    """Refuse a file of a type that is not read, by its suffix."""
    suffix = place.suffix.lower()
    if suffix and suffix not in READERS:
        what = "a text file" if suffix in TEXTS else f"of the unknown type {place.suffix}"
        raise DataError(
            f"the data file {place} is {what}. Types that are read: {', '.join(READERS)}. In JSONL, each "
            'line is an example: {"prompt": …, "completion": …}, or {"text": …} to learn all of it'
        )


def read_file(place: Path) -> Source:
    """Read one file that passed `check_type`; without a suffix it is read as JSONL."""
    try:
        return READERS.get(place.suffix.lower(), _jsonl)(place)
    except OSError as error:
        raise DataError(f"cannot read the data file {place}: {error.strerror or error}") from error


def _text(place: Path) -> str:
    try:
        return place.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"cannot read the data file {place}: it is no UTF-8 text (byte {error.start}). Understood: "
            f"{', '.join(READERS)}; spreadsheets have to be saved as CSV in UTF-8."
        ) from error


def _jsonl(place: Path) -> Source:
    found: list[Found] = []
    # Not splitlines: it takes U+2028 and others inside strings for ends of lines.
    for number, line in enumerate(_text(place).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = read_json(line)
        except ValueError as error:
            record = Unfit(f"it is no JSON ({error}); JSONL has one object a line")
        found.append((f"line {number}", record))
    return found, {}


def _json_file(place: Path) -> Source:
    """A list of objects, an object with one such list, or JSONL with this suffix."""
    text = _text(place)
    try:
        content = read_json(text)
    except ValueError as error:
        with contextlib.suppress(ValueError):
            read_json(text.strip().partition("\n")[0] or "{}")
            return _jsonl(place)
        raise DataError(f"{place} is no JSON ({error})") from error
    return _numbered(_list_in(content, place)), {}


def _list_in(content: Any, place: Path) -> list[Any]:
    """The records of a JSON file.

    Raises:
        DataError: It has several lists of objects; names them.
    """
    if not isinstance(content, Mapping):
        return content if isinstance(content, list) else [content]
    lists = {
        name: value
        for name, value in content.items()
        if isinstance(value, list) and value and all(isinstance(record, Mapping) for record in value)
    }
    if _fits(content) and not any(_fits(record) for records in lists.values() for record in records):
        return [content]
    if len(lists) > 1:
        raise DataError(
            f"{place} holds {len(lists)} lists of records: {listed(map(repr, lists), 8)}. "
            "Save each as a file of its own"
        )
    return next(iter(lists.values()), [content])


def _fits(record: Mapping[str, Any]) -> bool:
    return any(form.fits(record) for form in FORMS)


def _numbered(records: Iterable[Any]) -> list[Found]:
    return [(f"record {number}", record) for number, record in enumerate(records, start=1)]


def _csv(place: Path) -> Source:
    """Cells stay the texts that they are."""
    text = _text(place)
    head = text.partition("\n")[0]
    delimiter = max("\t;,", key=head.count) if re.search("[\t;,]", head) else ","
    if place.suffix.lower() == ".csv" and "," in head:
        delimiter = ","
    limit = csv.field_size_limit(sys.maxsize)
    found: list[Found] = []
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header = [name.strip() for name in next(rows, [])]
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise DataError(f"{place} has more than one column {', '.join(map(repr, twice))}")
        before = rows.line_num
        for row in rows:
            where, before = f"line {before + 1}", rows.line_num
            if row:
                found.append((where, _csv_record(header, row)))
    except csv.Error as error:
        raise DataError(f"{place} is no CSV: line {rows.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)
    return found, {}


def _csv_record(header: list[str], row: list[str]) -> dict[str, Any] | Unfit:
    if len(row) != len(header):
        fields = "1 field" if len(row) == 1 else f"{len(row)} fields"
        return Unfit(f"it has {fields} where the header has {len(header)}")
    return dict(zip(header, row, strict=True))


def _parquet(place: Path) -> Source:
    require("datasets", "train", "reading a Parquet file")
    import datasets

    pyarrow, parquet = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
    try:
        table = parquet.read_table(place)
    except pyarrow.ArrowException as error:
        raise DataError(f"{place} is no Parquet file that can be read: {first_line(error)}") from error
    try:
        return rows_of(datasets.Dataset(table))
    except Exception:  # a type or metadata that datasets does not know
        pass
    try:
        return _numbered(table.to_pylist()), {}
    except Exception as error:  # a damaged column can fail in any conversion
        raise DataError(f"{place} has values that cannot be read: {first_line(error)}") from error


def rows_of(data: Any) -> Source:
    """The rows of a data set, and the names of the classes in its columns."""
    classes = {
        column: list(feature.names)
        for column, feature in data.features.items()
        if getattr(feature, "names", None) is not None
    }
    return _numbered(
        {name: _without_nulls(value) for name, value in row.items()} for row in data.to_list()
    ), classes


def _without_nulls(value: Any) -> Any:
    """A value without nulls inside: in a table, each object has the keys of all others."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


READERS: dict[str, Callable[[Path], Source]] = {
    ".jsonl": _jsonl,
    ".json": _json_file,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
