"""Files that appear whole: written under another name, and moved into their place when they are done."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl

#: How long one writer waits for another, in seconds.
PATIENCE = 120.0


class HalfMovedError(OSError):
    """Of several files the first is in its place; moving another, or syncing their directory, failed."""


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new file that takes the place of ``path`` when the block ends: all of it, or none if the block fails.

    Whoever opens ``path`` meanwhile, or after a kill at any moment, finds the old file or the new one. A link
    at ``path`` is replaced, not followed. The new file has the permissions that the umask gives.

    Args:
        path: The file to write; its directory exists.

    Yields:
        The path to write to: an empty file, which may also be removed and made anew.

    Raises:
        OSError: The file cannot be written; ``path`` is as it was.
    """
    with atomic_files(path) as (waiting,):
        yield waiting


@contextlib.contextmanager
def atomic_files(
    *paths: str | os.PathLike[str], instead_of: str | os.PathLike[str] | None = None
) -> Iterator[list[Path]]:
    """Several files as `atomic_file`, moved in the order given, with nothing slow between the moves.

    Each is whole at every moment. Whoever reads between two moves finds some of them new and the others old.

    Args:
        *paths: The files to write, in one directory.
        instead_of: A file that is removed as soon as the first new one is in its place.

    Yields:
        The paths to write to.

    Raises:
        HalfMovedError: The first is in its place, and then something failed.
        OSError: The files cannot be written; nothing has changed.
    """
    places = [Path(path) for path in paths]
    waiting = {place.with_name(f".veneer-{secrets.token_hex(8)}.tmp"): place for place in places}
    moved = False
    try:
        for temporary in waiting:
            with temporary.open("x") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield list(waiting)
        for temporary in waiting:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            # safetensors makes a file of its own, which its owner alone may read.
            temporary.chmod(mode)
        for number, (temporary, place) in enumerate(waiting.items()):
            os.replace(temporary, place)
            moved = True
            if number == 0 and instead_of is not None:
                Path(instead_of).unlink(missing_ok=True)
        sync_directory(places[0].parent)
    except BaseException as error:
        for temporary in waiting:
            with contextlib.suppress(OSError):
                temporary.unlink()
        if isinstance(error, OSError):
            named = {str(temporary): str(place) for temporary, place in waiting.items()}
            if error.filename in named:
                error.filename = named[error.filename]  # the name that its reader knows
            if moved:
                raise HalfMovedError(error.errno, error.strerror, error.filename) from error
        raise


@contextlib.contextmanager
def locked(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Keep others that ask for the same out of a directory, in this process and in every other one.

    The lock ends with the block, or with the process. Where the system has none (Windows, some network file
    systems), nobody is kept out.

    Raises:
        TimeoutError: Another one has been in there for `PATIENCE` seconds.
        OSError: There is no such directory.
    """
    if sys.platform == "win32":
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        _wait_for_lock(handle, directory)
        yield
    finally:
        # By hand: a process that was forked meanwhile has the handle too, and would keep the lock.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


if sys.platform != "win32":

    def _wait_for_lock(handle: int, directory: str | os.PathLike[str]) -> None:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic() > end:
                    raise TimeoutError(
                        f"another process has been writing to {directory} for {PATIENCE:.0f} s"
                    ) from error
                time.sleep(0.005)
            except OSError:
                return  # a file system without locks


def sync_directory(directory: Path) -> None:
    """See to it that renames in a directory survive a loss of power, where the system can be asked to."""
    if os.name != "posix":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
