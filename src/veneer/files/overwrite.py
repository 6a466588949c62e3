"""Directories for results: checked before the long work, and complete or absent after it.

A directory is made beside its place, in a hidden one, and renamed when it is done. If files lie at the place,
their directory is renamed aside first: no portable call exchanges two directories. A run that is killed
between these two renames leaves nothing at the place, and both directories whole in the hidden one, as
``.NAME.<16 digits>/old`` and ``/new``. The next run that checks the place moves the new one there and removes
what is left over.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from veneer.atomic import disk_is_full, locked, new_directory
from veneer.errors import Hint, VeneerError
from veneer.wording import first_line

#: What a model in the directory that is written over would leave behind, to be read instead of the new one.
_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")


def check_replaceable(place: Path, overwrite: bool | None = None, what: str = "model") -> None:
    """Raise unless a directory of this name can be made; nothing is made yet.

    What a killed run has left of the same directory is removed first.

    Args:
        place: The directory to write.
        overwrite: Whether one that holds files already may be written into; None where nobody can choose.
        what: What would be written over there.

    Raises:
        VeneerError: It is a file, holds files, is or holds a mount point, or cannot be written.
    """
    real = Path(os.path.realpath(place))
    _tidy(real)
    check_no_file(place)
    if place.is_dir() and not overwrite and any(place.iterdir()):
        raise VeneerError(
            f"the directory {place} is not empty; choose another one",
            *(() if overwrite is None else (f", or write over its {what} with ", Hint("overwrite", True))),
        )
    for folder, _, _ in os.walk(real):
        if os.path.ismount(folder):
            raise VeneerError(
                f"{place} cannot be replaced: {folder} is a mount point, which cannot be renamed. "
                "Name a directory inside it"
            )
    for needed in [real.parent, *([real] if real.is_dir() else [])]:
        check_writable(needed)


def check_no_file(place: Path) -> None:
    """Raise where a file, a device or a pipe lies at the place of a directory."""
    if place.exists() and not place.is_dir():
        raise VeneerError(f"{place} is a file; the output must be a directory")


def check_writable(place: Path) -> None:
    """Raise unless files can be made in a directory, or in the nearest one above it that exists.

    Raises:
        VeneerError: With the reason.
    """
    there = next(parent for parent in (place.absolute(), *place.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        where = "" if there == place.absolute() else f"{there}: "
        raise VeneerError(
            f"cannot write to the directory {place}: {where}{error.strerror or error}"
        ) from error


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

    Where ``place`` holds files already, its model is replaced and its other files stay. At any moment, even
    after a kill, ``place`` is the old directory or the new one, never a mixture; between two renames it is
    missing. Files get the permissions that the umask gives.

    Args:
        place: The directory to write.
        overwrite: As for `check_replaceable`.
        what: As for `check_replaceable`.
        stale: Names of files of the old directory that are not kept.

    Raises:
        VeneerError: See `check_replaceable`; or the disk is full, refuses to be written to, or fails.
    """
    check_replaceable(place, overwrite, what)
    real = Path(os.path.realpath(place))
    try:
        with new_directory(real.parent), _temporary_directory(real) as folder:
            made = folder / _NEW
            made.mkdir()
            yield made
            check_replaceable(place, overwrite, what)  # somebody may have put files there meanwhile
            _set_permissions(made)
            _move(made, real, folder / _OLD, stale)
    except BaseException as error:
        refused = isinstance(error, OSError) and error.errno in _REFUSED
        if (refused or disk_is_full(error)) and not isinstance(error, VeneerError):
            raise VeneerError(
                f"{place} could not be written; nothing has changed: {first_line(error)}"
            ) from error
        raise


_NEW, _OLD = "new", "old"
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


def _set_permissions(made: Path) -> None:
    """Give files the usual permissions: safetensors makes its files readable by their owner only."""
    mode = stat.S_IMODE(made.stat().st_mode) & 0o666
    for file in made.rglob("*"):
        found = file.lstat()
        if stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and stat.S_IMODE(found.st_mode) != mode:
            file.chmod(mode)


def _move(made: Path, place: Path, aside: Path, stale: re.Pattern[str]) -> None:
    if not place.exists():
        os.rename(made, place)
        return
    _keep_others(place, made, stale)
    made.chmod(stat.S_IMODE(place.stat().st_mode))
    try:
        os.rename(place, aside)
        os.rename(made, place)
    except BaseException:
        if aside.exists() and not place.exists():
            os.rename(aside, place)
        raise


def _keep_others(old: Path, new: Path, stale: re.Pattern[str]) -> None:
    """Copy files that are neither replaced nor stale into the new directory."""
    for file in old.iterdir():
        target = new / file.name
        folder = file.is_dir() and not file.is_symlink()
        if folder and target.is_dir():
            _keep_others(file, target, stale)
        elif target.exists() or stale.fullmatch(file.name):
            continue
        elif folder:
            shutil.copytree(file, target, symlinks=True, copy_function=link_or_copy)
        else:
            link_or_copy(file, target)


def link_or_copy(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """The same file under another name where the disk allows it, else a copy; a link stays a link."""
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(source, target, follow_symlinks=False)


@contextlib.contextmanager
def _temporary_directory(place: Path) -> Iterator[Path]:
    """A hidden directory beside a place, which is removed at the end; it is locked while its run is alive."""
    with contextlib.ExitStack() as lock:
        while True:
            folder = place.with_name(f".{place.name}.{secrets.token_hex(8)}")
            folder.mkdir(mode=0o700)
            with contextlib.suppress(FileNotFoundError):
                lock.enter_context(locked(folder))
            if folder.exists():
                break
            lock.close()  # another run took it for one without an owner, in the moment before the lock
        try:
            yield folder
        finally:
            if place.exists() or not (folder / _OLD).exists():
                shutil.rmtree(folder, ignore_errors=True)


def _tidy(place: Path) -> None:
    """Finish what killed runs began: move a complete new directory into place, remove the rest."""
    if not place.parent.is_dir():
        return
    name = re.compile(re.escape(f".{place.name}.") + "[0-9a-f]{16}")
    left = [p for p in place.parent.iterdir() if name.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]
    for folder in left:
        with contextlib.ExitStack() as lock:
            try:
                if not lock.enter_context(locked(folder, wait=False)):
                    continue
            except OSError:  # another run has removed it
                continue
            if not place.exists() and (folder / _OLD).is_dir() and (folder / _NEW).is_dir():
                os.rename(folder / _NEW, place)
            shutil.rmtree(folder, ignore_errors=True)
