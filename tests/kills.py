"""Work that dies on its way, at any step that it takes on disk: what `kill -9` at that moment leaves.

A process that forks should have no threads, so this is for programs that `tests.processes` starts.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

KILLED = 9


def steps_of(work: Callable[[], object], place: Path) -> int:
    """How many steps the work takes on files below a directory; it is done, in a process of its own."""
    reading, writing = os.pipe()

    def count() -> None:
        seen = _watch(place, lambda number: None)
        work()
        os.write(writing, str(seen()).encode())

    assert _forked(count) == 0
    os.close(writing)
    with os.fdopen(reading, "rb") as told:
        return int(told.read())


def killed_at(step: int, work: Callable[[], object], place: Path) -> None:
    """Do the work in a process of its own, which dies just before the step with that number (from 1)."""

    def die(number: int) -> None:
        if number == step:
            os._exit(KILLED)

    def until_then() -> None:
        _watch(place, die)
        work()

    assert _forked(until_then) == KILLED, f"the work ended before its step {step}"


def done(work: Callable[[], object]) -> None:
    """Do the work in a process of its own, to its end."""
    assert _forked(work) == 0


def _forked(work: Callable[[], object]) -> int:
    sys.stdout.flush()
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _watch(place: Path, told: Callable[[int], None]) -> Callable[[], int]:
    """Call with its number before each step that changes files below a directory; returns their count."""
    number, root = 0, os.fspath(place)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal number
        if event == "open":
            changed = [_whole(arguments[0], -1)] if _writes(arguments[2]) else []
        elif event in ("os.rename", "os.link"):
            changed = [_whole(arguments[0], arguments[2]), _whole(arguments[1], arguments[3])]
        elif event in ("os.remove", "os.mkdir", "os.rmdir", "os.chmod"):
            changed = [_whole(arguments[0], arguments[-1])]
        else:
            return
        if any(path.startswith(root) for path in changed):
            number += 1
            told(number)

    sys.addaudithook(hook)
    return lambda: number


def _writes(flags: object) -> bool:
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


def _whole(path: object, directory: int) -> str:
    """A path from the root, or nothing for what is none; shutil.rmtree names files by an open directory."""
    if not isinstance(path, str | os.PathLike):
        return ""
    before = os.readlink(f"/proc/self/fd/{directory}") if directory >= 0 else os.getcwd()
    return os.path.join(before, path)
