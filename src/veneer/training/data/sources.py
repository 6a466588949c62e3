"""Where records come from: files, directories and data sets of the hub -> `Records` of one known form."""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsIndex

from ...doors import is_local
from ...errors import DataError
from ..models import quiet_transformers, require
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

#: Words in the names of files that tell of which split they are.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
#: Columns of lists that a CSV file can only hold as JSON.
LISTS = ("messages", "conversations", "tools")


class Records(list[dict[str, Any]]):
    """Records, with where each comes from and the form that they have.

    Attributes:
        source: What the user named.
        form: Their form.
        label_names: Names of the classes, where the source tells them.
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
        """The place of a record, as ``line 7``."""
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
        """How many, from where, of which form, and which columns are not used."""
        used = {*self.form.columns, *self.form.more}
        unused = sorted({str(name) for record in self for name in record} - used)
        line = f"{len(self)} {'record' if len(self) == 1 else 'records'} from {self.source}: {self.form}"
        if unused:
            line += f"; not used: {', '.join(unused[:6])}{', …' if len(unused) > 6 else ''}"
        near = near_columns(dict.fromkeys(unused), self.form.more)
        return line + (f" ({'; '.join(near)})" if near else "")


@dataclass
class Raw:
    """What a reader found.

    Attributes:
        records: What stands at each place, of whatever type.
        places: As many, as ``line 7``.
        problems: (place, what is wrong) of what could not be read at all.
        label_names: Names of the classes, where the source tells them.
    """

    records: list[Any] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    label_names: list[str] | None = None

    def add(self, place: str, record: object) -> None:
        """One more record."""
        self.records.append(record)
        self.places.append(place)


def read_records(source: str | os.PathLike[str], purpose: Purpose = "sft") -> Records:
    """The records of a file, a directory or a data set of the hub, all checked.

    Args:
        source: A ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file, a directory of such files,
            or an id of the hub: ``name``, ``owner/name`` or ``owner/name/config``; directories and ids take
            ``:split`` if it is not ``train``. Any other file is read as JSONL.
        purpose: ``sft``, ``dpo``, ``classification`` or ``prompt``: which forms are looked for.

    Raises:
        DataError: It is missing, empty or cannot be read, or some of its records cannot be used: one error.
        MissingExtraError: A library that reads the source is not installed.
    """
    name = os.fspath(source)
    raw = _raw(name)
    form = most_common_form(raw.records, purpose)
    problems = list(raw.problems)
    for place, record in zip(raw.places, raw.records, strict=True):
        try:
            if form is None:
                raise Unfit(lacking(record, purpose))
            read_as(form, record)
        except Unfit as error:
            problems.append((place, error.message))
    total = len(raw.records) + len(raw.problems)
    if problems:
        order = {place: number for number, place in enumerate(raw.places)}
        problems.sort(key=lambda problem: (_number(problem[0]), order.get(problem[0], 0)))
        columns = any("lacks columns" in str(words) for _, words in problems)
        raise DataError(problem_list(problems, total, name, understood(purpose) if columns else ""))
    if form is None:
        raise DataError(f"{name} holds no records")
    return Records(raw.records, source=name, form=form, places=raw.places, label_names=raw.label_names)


def _number(place: str) -> int:
    digits = place.rpartition(" ")[2]
    return int(digits) if digits.isdigit() else 0


def _raw(name: str) -> Raw:
    place = Path(name).expanduser()
    if place.is_dir():
        return _directory(place, None)
    if place.is_file():
        return _file(place)
    stem, _, split = name.partition(":")
    if split and Path(stem).expanduser().is_dir():
        return _directory(Path(stem).expanduser(), split)
    if (is_local(stem) and not _hub_like(stem)) or place.suffix.lower() in READERS:
        raise DataError(f"cannot read the data file {name}: No such file or directory")
    return _hub(stem, split or "train")


def _hub_like(name: str) -> bool:
    """Whether a name with two slashes may be OWNER/NAME/CONFIG rather than a path."""
    return name.count("/") == 2 and not name.startswith((".", "/", "~")) and "\\" not in name


def _file(place: Path) -> Raw:
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


def _jsonl(place: Path) -> Raw:
    raw = Raw()
    # Not splitlines: it takes U+2028 and others inside strings for ends of lines.
    for number, line in enumerate(_text(place).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            raw.add(f"line {number}", _json(line))
        except ValueError as error:
            raw.problems.append((f"line {number}", f"it is no JSON ({error}); JSONL has one object a line"))
    return raw


def _json_file(place: Path) -> Raw:
    """One list of objects, or JSONL under another name."""
    text = _text(place)
    if not text.lstrip().startswith("["):
        return _jsonl(place)
    try:
        content = _json(text)
    except ValueError as error:
        try:
            raw = _jsonl(place)
        except DataError:
            raw = Raw()
        if raw.records and not raw.problems:
            return raw
        raise DataError(f"{place} is no JSON ({error})") from error
    raw = Raw()
    for number, record in enumerate(content, start=1):
        raw.add(f"record {number}", record)
    return raw


def _csv(place: Path) -> Raw:
    """Every cell stays the text that it is; lists of messages are JSON in their cell."""
    text = _text(place)
    head = text.partition("\n")[0]
    marks = {mark: head.count(mark) for mark in "\t;,"}
    delimiter = max(marks, key=lambda mark: marks[mark]) if any(marks.values()) else ","
    if place.suffix.lower() == ".csv" and marks[","]:
        delimiter = ","
    limit = csv.field_size_limit(sys.maxsize)
    raw = Raw()
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
                _csv_row(raw, where, header, row)
    except csv.Error as error:
        raise DataError(f"{place} is no CSV: line {rows.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)
    return raw


def _csv_row(raw: Raw, where: str, header: list[str], row: list[str]) -> None:
    if len(row) != len(header):
        fields = "1 field" if len(row) == 1 else f"{len(row)} fields"
        raw.problems.append((where, f"it has {fields} where the header has {len(header)}"))
        return
    record: dict[str, Any] = dict(zip(header, row, strict=True))
    for column in LISTS:
        if record.get(column):
            try:
                record[column] = _json(record[column])
            except ValueError as error:
                raw.problems.append((where, f"{column} is no JSON ({error})"))
                return
    raw.add(where, record)


def _parquet(place: Path) -> Raw:
    require("pyarrow", "data", "reading a Parquet file")
    pyarrow = importlib.import_module("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")

    try:
        table = parquet.read_table(place)
    except pyarrow.ArrowException as error:
        raise DataError(f"{place} is no Parquet file that can be read: {_first_line(error)}") from error
    raw = Raw(label_names=_stored_names(table.schema.metadata))
    for number, record in enumerate(table.to_pylist(), start=1):
        raw.add(f"record {number}", record)
    return raw


def _stored_names(metadata: dict[bytes, bytes] | None) -> list[str] | None:
    """Names of the classes that the datasets library wrote beside a table."""
    try:
        stored = json.loads((metadata or {})[b"huggingface"])
        names = stored["info"]["features"]["label"]["names"]
    except (KeyError, ValueError, TypeError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


READERS: dict[str, Callable[[Path], Raw]] = {
    ".jsonl": _jsonl,
    ".json": _json_file,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}


def _directory(place: Path, split: str | None) -> Raw:
    """The files of one split, in the order of their names."""
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
    raw, chosen = Raw(), by_split[wanted]
    for file in chosen:
        part = _file(file)
        prefix = f"{file.relative_to(place)}, " if len(chosen) > 1 else ""
        raw.records += part.records
        raw.places += [prefix + where for where in part.places]
        raw.problems += [(prefix + where, words) for where, words in part.problems]
        raw.label_names = raw.label_names or part.label_names
    return raw


def _split_of(file: Path) -> str:
    words = {
        word
        for part in (*file.parts[:-1], file.stem)
        for word in part.lower().replace("_", "-").replace(".", "-").split("-")
    }
    return next((split for split, names in SPLITS.items() if words & set(names)), "")


def _saved_dataset(place: Path, split: str | None) -> Raw:
    require("datasets", "data", "reading a saved data set")
    import datasets

    try:
        found = datasets.load_from_disk(str(place))
    except (OSError, ValueError) as error:
        raise DataError(f"the data set in {place} cannot be read: {_first_line(error)}") from error
    if isinstance(found, datasets.DatasetDict):
        wanted = split or "train"
        if wanted not in found:
            raise DataError(f"{place} has no split {wanted!r} but {', '.join(found)}")
        found = found[wanted]
    return _dataset_rows(found)


def _dataset_rows(found: Any) -> Raw:
    names = getattr(found.features.get("label"), "names", None)
    raw = Raw(label_names=None if names is None else list(names))
    for number, record in enumerate(found.to_list(), start=1):
        raw.add(f"record {number}", record)
    return raw


def _hub(name: str, split: str) -> Raw:
    parts = name.split("/")
    if len(parts) > 3 or not all(parts):
        raise DataError(f"{name!r} is neither a file or directory that exists nor an id of the hub")
    require("datasets", "data", f"the data set {name!r} of the hub (there is no file of that name)")
    path, config = "/".join(parts[:2]), parts[2] if len(parts) == 3 else None
    with quiet_transformers():
        return _dataset_rows(_fetched(path, config, split))


def _fetched(path: str, config: str | None, split: str) -> Any:
    import datasets

    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.utils.logging.disable_progress_bar()
    try:
        with _offline_where_it_is():
            return datasets.load_dataset(path, config, split=split)
    except Exception as error:  # whatever the network, the hub or the files' reader raises
        raise DataError(
            f"{path!r} is no file or directory here, and as a data set of the hub it cannot be had "
            f"(split {split!r}{f', configuration {config!r}' if config else ''}): {_first_line(error)}. "
            "Check the name and the network, or give a file."
        ) from error
    finally:
        if bars:
            datasets.utils.logging.enable_progress_bar()


@contextlib.contextmanager
def _offline_where_it_is() -> Iterator[None]:
    """Where the hub does not answer, what was fetched before is used at once, not after many attempts."""
    import datasets
    import huggingface_hub

    places = (datasets.config, huggingface_hub.constants)
    before = [getattr(place, "HF_HUB_OFFLINE", False) for place in places]
    if not any(before) and not _hub_answers():
        for place in places:
            place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def _hub_answers(timeout: float = 4.0) -> bool:
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(
            os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=timeout
        ).close()
    except urllib.error.HTTPError:  # an answer, too
        return True
    except (OSError, ValueError):
        return False
    return True


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
