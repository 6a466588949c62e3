"""Ctrl-C: finish the step or the answer in hand; a second one leaves at once."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from .launcher import launched


class Interrupted(KeyboardInterrupt):
    """A run was stopped between two steps.

    Attributes:
        step: Optimizer steps done.
        steps: Optimizer steps of the whole run.
        checkpoint: Where it can be resumed from.
    """

    def __init__(self, step: int, steps: int, checkpoint: Path) -> None:
        super().__init__(f"stopped after step {step} of {steps}")
        self.step, self.steps, self.checkpoint = step, steps, checkpoint


class Stop:
    """A request to stop."""

    def __init__(self) -> None:
        self.asked = False


#: Within so many seconds, a second signal is the terminal's first, passed on by the launcher.
ECHO_SECONDS = 1.0
KINDS = (signal.SIGINT,) if sys.platform == "win32" else (signal.SIGINT, signal.SIGTERM)
STOPPING = "Stopping after this step, with a checkpoint; press Ctrl-C again to leave at once."


@contextmanager
def stop_on_signals(
    say: Callable[[str], None] | None = None, kinds: Sequence[signal.Signals] = KINDS
) -> Iterator[Stop]:
    """The first signal asks for a stop; a second one of the same kind raises KeyboardInterrupt.

    Outside the main thread, where Python lets nobody handle signals, nothing is changed.

    Args:
        say: Called with `STOPPING` when the first one comes.
        kinds: Which signals.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    came: dict[int, float] = {}
    telling: list[threading.Thread] = []

    def handle(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number in came and not (launched() and now - came[number] < ECHO_SECONDS):
            raise KeyboardInterrupt
        first = not came
        came.setdefault(number, now)
        stop.asked = True
        if first and say is not None:
            # In a thread: the signal may have come in the middle of a line, with the console in use.
            telling.append(threading.Thread(target=say, args=(STOPPING,), daemon=True))
            telling[0].start()

    former: dict[signal.Signals, Any] = {kind: signal.signal(kind, handle) for kind in kinds}
    try:
        yield stop
    finally:
        for kind, handler in former.items():
            signal.signal(kind, signal.SIG_DFL if handler is None else handler)
        for thread in telling:
            thread.join(timeout=1.0)
