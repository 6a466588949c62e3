"""One check of an adapter and what it found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One check of an adapter.

    Attributes:
        name: What was checked.
        passed: Whether it is right; None where there is nothing to check.
        found: What was found, in words.
    """

    name: str
    passed: bool | None
    found: str

    def __str__(self) -> str:
        word = {True: "ok", False: "FAILED", None: "–"}[self.passed]
        return f"{word:<7} {self.name}: {self.found}"
