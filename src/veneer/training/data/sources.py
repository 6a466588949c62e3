"""Read `Records` from files, directories and data sets of the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from ...errors import DataError
from ...hub import cached_if_unreachable, is_local
from ...wording import first_line
from ..libraries import quiet_libraries, require
from .columns import renamed
from .files import READERS, TEXTS, Found, Source, check_type, read_file, rows_of
from .forms import Purpose
from .problems import read_all
from .recognition import common_form, read_as
from .records import Records

#: Words in names of files that identify their split.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}


def read_records(
    source: str | os.PathLike[str], purpose: Purpose = "sft", columns: Mapping[str, str] | None = None
) -> Records:
    """Read and check the records of a file, a directory or a data set of the hub.

    Args:
        source: A ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file, a directory of such files,
            or an id of the hub: ``name``, ``owner/name`` or ``owner/name/config``. Directories and ids may be
            followed by ``:split``, by default ``train``. A ``.json`` file is a list of records, or an object
            with one such list.
        purpose: ``sft``, ``dpo``, ``kto``, ``classification`` or ``prompt``.
        columns: Columns under other names, as ``{"prompt": "question"}``: they are renamed first.

    Raises:
        DataError: The source is missing, empty, of an unknown type or cannot be read; it has none of the
            ``columns``; or some of its records cannot be used.
        MissingExtraError: A library to read the source is not installed.
    """
    name = os.fspath(source)
    found, classes = _reader(name)()
    if columns:
        found = renamed(found, columns, name)
    form = common_form(found, purpose, name)
    read_all(found, partial(read_as, form), name)
    places = [place for place, _ in found]
    records = (record for _, record in found)
    label_names = classes.get((columns or {}).get("label", "label"))
    return Records(records, source=name, form=form, places=places, label_names=label_names)


def check_source(source: str | os.PathLike[str]) -> None:
    """Check that a source is there, without reading it; the hub is not asked for its data sets.

    Raises:
        DataError: It is neither a file or directory nor an id of the hub, or a file of an unknown type.
    """
    _reader(os.fspath(source))


def _reader(name: str) -> Callable[[], Source]:
    place = Path(name).expanduser()
    if place.is_dir():
        return partial(_directory, place, None)
    if place.is_file():
        check_type(place)
        return partial(read_file, place)
    stem, _, split = name.partition(":")
    if split and Path(stem).expanduser().is_dir():
        return partial(_directory, Path(stem).expanduser(), split)
    # A name with two slashes may be OWNER/NAME/CONFIG rather than a path.
    an_id = name.count("/") == 2 and not name.startswith((".", "/", "~")) and "\\" not in name
    suffixes = {place.suffix.lower(), Path(stem).suffix.lower()}
    if (is_local(stem) and not an_id) or suffixes & {*READERS, *TEXTS}:
        raise DataError(f"cannot read the data file {name}: No such file or directory")
    return partial(_hub, stem, split or "train")


def _directory(place: Path, split: str | None) -> Source:
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
    found: list[Found] = []
    classes: dict[str, list[str]] = {}
    for file in by_split[wanted]:
        part, names = read_file(file)
        prefix = f"{file.relative_to(place)}, " if len(by_split[wanted]) > 1 else ""
        found += [(prefix + where, record) for where, record in part]
        classes |= names
    return found, classes


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
    return rows_of(found)


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
                return rows_of(datasets.load_dataset(path, config, split=split))
        except Exception as error:  # of the network, the hub or a reader of files
            raise DataError(
                f"{path!r} is no file or directory here, and as a data set of the hub it cannot be had "
                f"(split {split!r}{f', configuration {config!r}' if config else ''}): "
                f"{first_line(error)}{unreachable and f' ({unreachable})'}. "
                "Check the name and the network, or give a file."
            ) from error
