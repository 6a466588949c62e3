"""Directories for results: checked before the long work, and whole or not there at all after it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import Hint, VeneerError

#: What a model in the directory that is written over would leave behind, to be read instead of the new one.
_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")


def check_replaceable(place: Path, overwrite: bool | None = None, what: str = "model") -> None:
    """Raise unless a directory of this name can be made; nothing is made yet.

    Args:
        place: The directory to write.
        overwrite: Whether one that holds files already may be written into; None where nobody can choose.
        what: What would be written over there.

    Raises:
        VeneerError: It is a file, holds files, or cannot be written.
    """
    if place.is_file():
        raise VeneerError(f"{place} is a file; name a directory for the output")
    if place.is_dir() and not overwrite and any(place.iterdir()):
        raise VeneerError(
            f"the directory {place} is not empty; name another one",
            *(() if overwrite is None else (f", or write over its {what} with ", Hint("overwrite", True))),
        )
    there = next(parent for parent in (place, *place.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise VeneerError(f"cannot write {place}: {there} is no directory that can be written to")


def check_room(place: Path, needed: int) -> None:
    """Raise if the disk of a directory that is to be made has too little room.

    Raises:
        VeneerError: With both sizes.
    """
    there = next(parent for parent in (place, *place.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise VeneerError(
            f"{place} will take {needed / 1e6:,.0f} MB, and its disk has {free / 1e6:,.0f} MB left. "
            "Free some space, or name an output on another disk."
        )


@contextlib.contextmanager
def replacing(
    place: Path,
    overwrite: bool | None = None,
    what: str = "model",
    stale: re.Pattern[str] = _WEIGHTS,
) -> Iterator[Path]:
    """A directory to write into that becomes ``place`` at the end; a failure leaves ``place`` as it was.

    Where ``place`` holds files already, its model is replaced and its other files stay.

    Args:
        place: The directory to write.
        overwrite: As for `check_replaceable`.
        what: As for `check_replaceable`.
        stale: Names of files that are taken away from what is written over, to be read no more.

    Raises:
        VeneerError: See `check_replaceable`.
    """
    check_replaceable(place, overwrite, what)
    new = [parent for parent in place.absolute().parents if not parent.exists()]
    place.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}-"))
    try:
        made = folder / "made"
        made.mkdir()
        yield made
        _move(made, place, stale)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in new:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _move(made: Path, place: Path, stale: re.Pattern[str]) -> None:
    if place.is_dir() and not any(place.iterdir()):
        place.rmdir()
    if not place.exists():
        made.rename(place)
        return
    names = {file.name for file in made.iterdir()}
    for file in sorted(made.iterdir()):
        if file.is_dir() and (place / file.name).is_dir():
            _move(file, place / file.name, stale)
        else:
            file.replace(place / file.name)
    for old in place.iterdir():
        if stale.fullmatch(old.name) and old.name not in names:
            old.unlink()
