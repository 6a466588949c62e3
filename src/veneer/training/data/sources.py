"""Read `Records` from files, directories and data sets of the hub."""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

from ...errors import DataError
from ...hub import cached_if_unreachable, is_local
from ...wording import first_line
from ..libraries import quiet_libraries, require
from .forms import (
    Form,
    Problem,
    Purpose,
    Unfit,
    lacking,
    most_common_form,
    near_columns,
    problem_list,
    read_as,
    understood,
)

#: A place, such as ``line 7``, and the record there or the `Unfit` that says why there is none.
Found = tuple[str, Any]
#: The contents of a source, and the names of its classes, if it has them.
Source = tuple[list[Found], "list[str] | None"]
#: Words in names of files that identify their split.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
#: Columns with lists, which are JSON in a CSV file.
LISTS = ("messages", "conversations", "tools")


class Records(list[dict[str, Any]]):
    """Records of one form, with the place of each.

    Attributes:
        source: What the user named.
        form: Their form.
        label_names: Names of the classes, if the source has them.
    """

    def __init__(
        self,
        records: Iterable[dict[str, Any]],
        *,
        source: str,
        form: Form,
        places: Sequence[str] | None = None,
        label_names: list[str] | None = None,
    ) -> None:
        super().__init__(records)
        self.source, self.form, self.label_names = source, form, label_names
        self._places = places

    def where(self, index: SupportsIndex) -> str:
        """The place of a record, such as ``line 7``."""
        number = int(index)
        return self._places[number] if self._places is not None else f"record {number + 1}"

    def first(self, number: int) -> Records:
        """The first few of them."""
        return Records(
            self[:number],
            source=self.source,
            form=self.form,
            places=self._places,
            label_names=self.label_names,
        )

    def line(self) -> str:
        """A line for the user: number, source and form of the records, and unused columns."""
        used = {*self.form.columns, *self.form.more}
        unused = sorted({str(name) for record in self for name in record} - used)
        line = f"{len(self)} {'record' if len(self) == 1 else 'records'} from {self.source}: {self.form}"
        if unused:
            line += f"; not used: {', '.join(unused[:6])}{', …' if len(unused) > 6 else ''}"
        near = near_columns(dict.fromkeys(unused), self.form.more)
        return line + (f" ({'; '.join(near)})" if near else "")


def read_records(source: str | os.PathLike[str], purpose: Purpose = "sft") -> Records:
    """Read and check the records of a file, a directory or a data set of the hub.

    Args:
        source: A ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file, a directory of such files,
            or an id of the hub: ``name``, ``owner/name`` or ``owner/name/config``. Directories and ids may be
            followed by ``:split``, by default ``train``. Other files are read as JSONL.
        purpose: ``sft``, ``dpo``, ``classification`` or ``prompt``.

    Raises:
        DataError: The source is missing, empty or cannot be read, or some of its records cannot be used.
        MissingExtraError: A library to read the source is not installed.
    """
    name = os.fspath(source)
    found, label_names = _found(name)
    form = most_common_form([record for _, record in found], purpose)
    problems: list[Problem] = []
    for place, record in found:
        try:
            if isinstance(record, Unfit):
                raise record
            if form is None:
                raise Unfit(lacking(record, purpose))
            read_as(form, record)
        except Unfit as error:
            problems.append((place, error.message))
    if problems:
        columns = any("lacks columns" in str(words) for _, words in problems)
        raise DataError(problem_list(problems, len(found), name, understood(purpose) if columns else ""))
    if form is None:
        raise DataError(f"{name} holds no records")
    places = [place for place, _ in found]
    records = (record for _, record in found)
    return Records(records, source=name, form=form, places=places, label_names=label_names)


def _found(name: str) -> Source:
    place = Path(name).expanduser()
    if place.is_dir():
        return _directory(place, None)
    if place.is_file():
        return _file(place)
    stem, _, split = name.partition(":")
    if split and Path(stem).expanduser().is_dir():
        return _directory(Path(stem).expanduser(), split)
    # A name with two slashes may be OWNER/NAME/CONFIG rather than a path.
    an_id = name.count("/") == 2 and not name.startswith((".", "/", "~")) and "\\" not in name
    suffixes = {place.suffix.lower(), Path(stem).suffix.lower()}
    if (is_local(stem) and not an_id) or suffixes & {*READERS, ".txt"}:
        raise DataError(f"cannot read the data file {name}: No such file or directory")
    return _hub(stem, split or "train")


def _file(place: Path) -> Source:
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


def _json(text: str) -> Any:
    """A JSON value.

    Raises:
        ValueError: It is none, or nested too deeply to read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _jsonl(place: Path) -> Source:
    found: list[Found] = []
    # Not splitlines: it takes U+2028 and others inside strings for ends of lines.
    for number, line in enumerate(_text(place).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = _json(line)
        except ValueError as error:
            record = Unfit(f"it is no JSON ({error}); JSONL has one object a line")
        found.append((f"line {number}", record))
    return found, None


def _json_file(place: Path) -> Source:
    """A list of objects, or JSONL with this suffix."""
    text = _text(place)
    if not text.lstrip().startswith("["):
        return _jsonl(place)
    try:
        content = _json(text)
    except ValueError as error:
        raise DataError(f"{place} is no JSON ({error})") from error
    return _numbered(content), None


def _numbered(records: Iterable[Any]) -> list[Found]:
    return [(f"record {number}", record) for number, record in enumerate(records, start=1)]


def _csv(place: Path) -> Source:
    """Cells are kept as text, except for lists, which are JSON."""
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
    return found, None


def _csv_record(header: list[str], row: list[str]) -> dict[str, Any] | Unfit:
    if len(row) != len(header):
        fields = "1 field" if len(row) == 1 else f"{len(row)} fields"
        return Unfit(f"it has {fields} where the header has {len(header)}")
    record: dict[str, Any] = dict(zip(header, row, strict=True))
    for column in LISTS:
        if record.get(column):
            try:
                record[column] = _json(record[column])
            except ValueError as error:
                return Unfit(f"{column} is no JSON ({error})")
    return record


def _parquet(place: Path) -> Source:
    require("datasets", "train", "reading a Parquet file")
    import datasets

    pyarrow, parquet = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
    try:
        table = parquet.read_table(place)
    except pyarrow.ArrowException as error:
        raise DataError(f"{place} is no Parquet file that can be read: {first_line(error)}") from error
    try:
        return _rows_of(datasets.Dataset(table))
    except (TypeError, ValueError):  # a type or metadata that datasets does not know
        return _numbered(table.to_pylist()), None


READERS: dict[str, Callable[[Path], Source]] = {
    ".jsonl": _jsonl,
    ".json": _json_file,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}


def _directory(place: Path, split: str | None) -> Source:
    """The files of one split, in alphabetical order."""
    if (place / "dataset_dict.json").is_file() or (place / "state.json").is_file():
        return _saved_dataset(place, split)
    files = [
        file
        for file in sorted(place.rglob("*"))
        if file.suffix.lower() in READERS
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(place).parts)
    ]
    if not files:
        raise DataError(f"the directory {place} holds no data: looked for {', '.join(READERS)}")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file.relative_to(place)), []).append(file)
    wanted = split or ("train" if "train" in by_split or len(by_split) > 1 else next(iter(by_split)))
    if wanted not in by_split:
        raise DataError(
            f"the directory {place} holds no split {wanted!r}: it has "
            f"{', '.join(name or f'{len(files)} files of no split' for name, files in by_split.items())}. "
            f"Name one as {place}:SPLIT, or a file"
        )
    found, label_names = [], None
    for file in by_split[wanted]:
        part, names = _file(file)
        prefix = f"{file.relative_to(place)}, " if len(by_split[wanted]) > 1 else ""
        found += [(prefix + where, record) for where, record in part]
        label_names = label_names or names
    return found, label_names


def _split_of(file: Path) -> str:
    words = set(re.split(r"[-_./\\]", file.with_suffix("").as_posix().lower()))
    return next((split for split, names in SPLITS.items() if words & set(names)), "")


def _saved_dataset(place: Path, split: str | None) -> Source:
    require("datasets", "train", "reading a saved data set")
    import datasets

    try:
        found = datasets.load_from_disk(str(place))
    except (OSError, ValueError) as error:
        raise DataError(f"the data set in {place} cannot be read: {first_line(error)}") from error
    if isinstance(found, datasets.DatasetDict):
        wanted = split or "train"
        if wanted not in found:
            raise DataError(f"{place} has no split {wanted!r} but {', '.join(found)}")
        found = found[wanted]
    return _rows_of(found)


def _rows_of(found: Any) -> Source:
    """The rows of a data set and, if it has them, the names of its classes."""
    names = getattr(found.features.get("label"), "names", None)
    return _numbered(found.to_list()), None if names is None else list(names)


def _hub(name: str, split: str) -> Source:
    parts = name.split("/")
    if len(parts) > 3 or not all(parts):
        raise DataError(f"{name!r} is neither a file or directory that exists nor an id of the hub")
    require("datasets", "train", f"the data set {name!r} of the hub (there is no file of that name)")
    import datasets

    path, config = "/".join(parts[:2]), parts[2] if len(parts) == 3 else None
    with cached_if_unreachable() as unreachable:
        try:
            with quiet_libraries():
                return _rows_of(datasets.load_dataset(path, config, split=split))
        except Exception as error:  # of the network, the hub or a reader of files
            raise DataError(
                f"{path!r} is no file or directory here, and as a data set of the hub it cannot be had "
                f"(split {split!r}{f', configuration {config!r}' if config else ''}): "
                f"{first_line(error)}{unreachable and f' ({unreachable})'}. "
                "Check the name and the network, or give a file."
            ) from error
