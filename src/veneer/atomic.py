"""Files that appear whole: written under another name, and moved into their place when they are done."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new file that takes the place of ``path`` when the block ends: all of it, or none if the block fails.

    Whoever opens ``path`` meanwhile, or after a kill at any moment, finds the old file or the new one. A link
    at ``path`` is replaced, not followed. The new file has the permissions that the umask gives.

    Where two files belong together, nest the blocks: the inner file is moved first, and neither before both
    are written.

    Args:
        path: The file to write; its directory exists.

    Yields:
        The path to write to: an empty file, which may also be removed and made anew.

    Raises:
        OSError: The file cannot be written; ``path`` is as it was.
    """
    place = Path(path)
    temporary = place.with_name(f".veneer-{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("x") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        # safetensors makes a file of its own, which its owner alone may read.
        temporary.chmod(mode)
        os.replace(temporary, place)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename == str(temporary):
            error.filename = str(place)  # the name that its reader knows
        raise
    sync_directory(place.parent)


def sync_directory(directory: Path) -> None:
    """See to it that renames in a directory survive a loss of power, where the system can be asked to."""
    if os.name != "posix":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
