"""Work that dies on its way, or finds the disk full: at any step that it takes on disk, or at any moment.

A process that forks should have no threads, so this is for tests without them and for programs that
`tests.processes` starts.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

KILLED = 9
#: Everything by which a program changes a directory or a file, as Python announces it before it happens.
_CALLS = frozenset(
    "open os.rename os.remove os.mkdir os.rmdir os.chmod os.truncate os.link os.symlink os.utime".split()
)


def steps_of(work: Callable[[], object], place: Path) -> int:
    """How many steps the work takes on files below a directory; it is done, in a process of its own."""
    reading, writing = os.pipe()

    def count() -> None:
        seen = watch(place, lambda number, call: None)
        work()
        os.write(writing, str(seen()).encode())

    assert ended(forked(count)) == 0
    os.close(writing)
    with os.fdopen(reading, "rb") as told:
        return int(told.read())


def dies_at(step: int, work: Callable[[], object], place: Path) -> bool:
    """Do the work in a process of its own, which dies just before the step with that number (from 1).

    Returns:
        False if the work ended before.
    """

    def die(number: int, call: str) -> None:
        if number == step:
            os._exit(KILLED)

    def until_then() -> None:
        watch(place, die)
        work()

    status = ended(forked(until_then))
    assert status in (0, KILLED), f"the work itself failed: {status}"
    return status == KILLED


def killed_at(step: int, work: Callable[[], object], place: Path) -> None:
    """As `dies_at`; work that ended before is an error."""
    assert dies_at(step, work, place), f"the work ended before its step {step}"


def killed_after(seconds: float, work: Callable[[], object]) -> bool:
    """Do the work in a process of its own, and kill it after a time; False if it ended before."""
    child = forked(work)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    status = ended(child)
    assert status in (0, -signal.SIGKILL), f"the work itself failed: {status}"
    return status != 0


def done(work: Callable[[], object]) -> None:
    """Do the work in a process of its own, to its end."""
    assert ended(forked(work)) == 0


def forked(work: Callable[[], object]) -> int:
    """Begin work in another process, whose number is returned."""
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, in newer Pythons
        child = os.fork()
    if not child:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)  # even where the traceback cannot be printed
    return child


def ended(child: int) -> int:
    """Wait for a process: its exit code, or the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def watch(place: Path, told: Callable[[int, str], None], reads: bool = False) -> Callable[[], int]:
    """Watch this process from here on.

    Args:
        place: The directory below which changes count.
        told: Called with a number, from 1, and the name of the call before each step that changes something,
            or syncs it; what it raises is raised there.
        reads: Count what opens a file or a directory to read it, too.

    Returns:
        The number of steps so far.
    """
    number, root = 0, os.fspath(place)

    def step(call: str) -> None:
        nonlocal number
        number += 1
        told(number, call)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _CALLS:
            return
        if event == "open":
            changed = [_whole(arguments[0], -1)] if reads or _writes(arguments[2]) else []
        elif event in ("os.rename", "os.link"):
            changed = [_whole(arguments[0], arguments[2]), _whole(arguments[1], arguments[3])]
        elif event == "os.symlink":
            changed = [_whole(arguments[1], arguments[2])]
        elif event == "os.truncate":
            changed = [_whole(arguments[0], -1)]
        else:
            changed = [_whole(arguments[0], arguments[-1])]
        if any(path.startswith(root) for path in changed):
            step(event)

    def synced(handle: Any) -> None:
        number = handle if isinstance(handle, int) else handle.fileno()
        if os.readlink(f"/proc/self/fd/{number}").startswith(root):
            step("os.fsync")
        sync(handle)

    sync = os.fsync
    os.fsync = synced
    sys.addaudithook(hook)
    return lambda: number


def _writes(flags: object) -> bool:
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


def _whole(path: object, directory: int) -> str:
    """A path from the root, or nothing for what is none; shutil.rmtree names files by an open directory."""
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    if not isinstance(path, str | os.PathLike):
        return ""
    before = os.readlink(f"/proc/self/fd/{directory}") if directory >= 0 else os.getcwd()
    return os.path.join(before, path)
