"""Atomic writes: a file is written under another name and renamed when it is complete."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from veneer.wording import warn

if sys.platform != "win32":
    import fcntl

#: Seconds that one writer waits for another.
PATIENCE = 120.0

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = re.compile(
    r"no space left on device|disk quota exceeded|file too large|PytorchStreamWriter failed writing"
    r"|inline_container.*unexpected pos",
    re.I,
)


class HalfMovedError(OSError):
    """The first of several files was moved; moving another failed."""


def disk_is_full(error: BaseException) -> bool:
    """Whether a full disk is behind an error; safetensors and torch say so in words alone."""
    return (isinstance(error, OSError) and error.errno in _FULL) or bool(_FULL_WORDS.search(str(error)))


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a new file that replaces ``path`` when the block ends, and is discarded if the block fails.

    At every moment, even after the process is killed, ``path`` is the complete old file or the complete new
    one. A link at ``path`` is replaced, not followed. The umask decides the permissions of the new file.

    Args:
        path: The file to write; its directory exists.

    Yields:
        The path to write to: an empty file, which may also be removed and created again.

    Raises:
        OSError: The file cannot be written; ``path`` is unchanged.
    """
    with atomic_files(path) as (waiting,):
        yield waiting


@contextlib.contextmanager
def atomic_files(
    *paths: str | os.PathLike[str], instead_of: str | os.PathLike[str] | None = None
) -> Iterator[list[Path]]:
    """Write several files as `atomic_file` does, and move them one right after another, in this order.

    Each is complete at every moment. A reader between two moves finds some of them new and the others old. If
    none is there before, all of them are in the end, or none.

    Args:
        *paths: The files to write, in one directory.
        instead_of: A file to remove as soon as the first new one is in place.

    Yields:
        The paths to write to.

    Raises:
        HalfMovedError: Moving another file failed after the first had replaced an old one.
        OSError: The files cannot be written; nothing has changed.
    """
    places = [Path(path) for path in paths]
    waiting = {place.with_name(f".veneer-{secrets.token_hex(8)}.tmp"): place for place in places}
    old = [*places, *([] if instead_of is None else [instead_of])]
    fresh, moved = not any(map(os.path.lexists, old)), list[Path]()
    try:
        for temporary in waiting:
            with temporary.open("x") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield list(waiting)
        for temporary in waiting:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            # safetensors replaces the file with one that only its owner may read.
            temporary.chmod(mode)
        for number, (temporary, place) in enumerate(waiting.items()):
            os.replace(temporary, place)
            moved.append(place)
            if number == 0 and instead_of is not None:
                Path(instead_of).unlink(missing_ok=True)
        _sync_directory(places[0].parent)
    except BaseException as error:
        for left in [*waiting, *(moved if fresh else ())]:
            with contextlib.suppress(OSError):
                left.unlink()
        if isinstance(error, OSError):
            named = {str(temporary): str(place) for temporary, place in waiting.items()}
            if error.filename in named:
                error.filename = named[error.filename]
            if moved and not fresh:
                raise HalfMovedError(error.errno, error.strerror, error.filename) from error
        raise


@contextlib.contextmanager
def new_directory(place: str | os.PathLike[str]) -> Iterator[None]:
    """Make a directory and its parents; if the block fails, remove those again that are empty.

    Raises:
        OSError: It cannot be made; nothing has changed.
    """
    new = [path for path in (Path(place), *Path(place).parents) if not path.exists()]
    try:
        Path(place).mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in new:
            with contextlib.suppress(OSError):  # not made, or somebody uses it meanwhile
                path.rmdir()
        raise


@contextlib.contextmanager
def locked(directory: str | os.PathLike[str], *, wait: bool = True) -> Iterator[bool]:
    """Lock a directory against other callers of this function, in this process and in every other.

    The lock ends with the block, or with the process.

    Args:
        directory: It exists.
        wait: Wait while somebody else has the lock; else go on without it.

    Yields:
        Whether it is locked: not on Windows and some network file systems, which have no such locks.

    Raises:
        TimeoutError: Somebody else has held the lock for `PATIENCE` seconds.
        OSError: There is no such directory.
    """
    if sys.platform == "win32":
        yield False
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        yield _lock(handle, directory, wait)
    finally:
        # Closing is not enough: a process forked meanwhile has the handle too, and would keep the lock.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


if sys.platform != "win32":

    def _lock(handle: int, directory: str | os.PathLike[str], wait: bool) -> bool:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError as error:
                if not wait:
                    return False
                if time.monotonic() > end:
                    raise TimeoutError(
                        f"another process has been writing to {directory} for {PATIENCE:.0f} s"
                    ) from error
                time.sleep(0.005)
            except OSError:
                return False  # a file system without locks


def _sync_directory(directory: Path) -> None:
    """Make renames in a directory survive a power failure, where the system supports it."""
    if os.name != "posix":
        return
    try:
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        warn(
            f"the new files in {directory} are complete, but the disk did not confirm them "
            f"({error.strerror or error}): they may not survive a power failure"
        )
