"""Workers as the sweep sees them: here, in its own process, or elsewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from .packs import Packs
from .trial import Trial
from .worker import Worker


class Lost(Exception):
    """A worker is gone, with the runs that it had; says why."""


class Handle(ABC):
    """A worker.

    Attributes:
        name: For messages.
        packs: What runs take, and what it has room for.
        trials: The runs that it has.
        busy: Whether it trains.
        seconds: How long it trains before it says how far it is; it takes a step at least.
    """

    seconds = 0.0

    def __init__(self, name: str) -> None:
        self.name = name
        self.packs = Packs({}, 0)
        self.trials: list[Trial] = []
        self.busy = False

    @abstractmethod
    def ask(self, method: str, *given: Any) -> None:
        """Let it call a method of `Worker`."""

    @abstractmethod
    def answer(self) -> Any:
        """What the method returned that was asked for last; waits for it.

        Raises:
            VeneerError: What the method raised.
            Lost: There will be no answer.
        """

    def call(self, method: str, *given: Any) -> Any:
        """Ask, and wait for the answer."""
        self.ask(method, *given)
        return self.answer()

    @staticmethod
    @abstractmethod
    def first(handles: Sequence[Any]) -> Any:
        """The first of several workers that has an answer."""


class Here(Handle):
    """The one worker of a sweep in this process."""

    def __init__(self, worker: Worker) -> None:
        super().__init__("this process")
        self.worker = worker

    def ask(self, method: str, *given: Any) -> None:
        self.answered = getattr(self.worker, method)(*given)

    def answer(self) -> Any:
        return self.answered

    @staticmethod
    def first(handles: Sequence[Here]) -> Here:
        return handles[0]
