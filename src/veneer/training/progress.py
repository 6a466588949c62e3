"""Progress reports of long jobs, on standard error and never on standard output."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

Advance = Callable[[int, str], None]
#: Seconds without a word, where nobody sees a spinner.
PATIENCE = 3.0


class Progress(Protocol):
    """Receives the reports of this package."""

    def say(self, line: str) -> None:
        """One line about what happens now."""

    def bar(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """A context manager whose value is called with (steps done since the last call, note)."""


class Silent:
    """Reports nothing."""

    def say(self, line: str) -> None:
        """Nothing."""

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        """A bar that nobody sees."""
        yield lambda steps, note: None


def waiting(progress: Progress | None, title: str) -> AbstractContextManager[None]:
    """What `Terminal.waiting` gives; nothing where the reports go elsewhere."""
    return progress.waiting(title) if isinstance(progress, Terminal) else nullcontext()


class Terminal:
    """Reports on standard error: a live bar on a terminal, a few plain lines anywhere else."""

    def __init__(self) -> None:
        from .console import PlainConsole

        self.console = PlainConsole(stderr=True)

    def say(self, line: str) -> None:
        """Print one line."""
        self.console.print(line, soft_wrap=True)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        """A bar with a note and the time left, or about six lines if this is no terminal."""
        if self.console.is_terminal:
            with self._live(title, total) as live:
                yield live
            return
        begun, done, said = time.monotonic(), 0, 0

        def advance(steps: int, note: str) -> None:
            nonlocal done, said
            done += steps
            if steps and (done >= total or 5 * (done - said) >= total):
                said = done
                spent = time.monotonic() - begun
                left = spent / done * max(total - done, 0)
                words = [
                    f"{title} {done}/{total}",
                    note,
                    f"{spent:.0f} s",
                    f"{left:.0f} s left" if left else "",
                ]
                self.say("  " + ", ".join(word for word in words if word))

        yield advance

    @contextmanager
    def waiting(self, title: str) -> Iterator[None]:
        """Say what takes its time: at once on a terminal, anywhere else after `PATIENCE` seconds."""
        if self.console.is_terminal:
            from rich.text import Text

            with self.console.status(Text(f"{title} …"), spinner_style="none"):
                yield
            return
        late = threading.Timer(PATIENCE, self.say, [f"{title} …"])
        late.daemon = True
        late.start()
        try:
            yield
        finally:
            late.cancel()

    @contextmanager
    def _live(self, title: str, total: int) -> Iterator[Advance]:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=self.console) as progress:
            task = progress.add_task(title, total=total, note="")
            yield lambda steps, note: progress.update(task, advance=steps, note=note)
