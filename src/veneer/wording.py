"""How sentences are made, once for all of them."""

from __future__ import annotations

import difflib
import os
import re
import sys
import warnings
from collections.abc import Collection, Iterable, Sequence
from typing import TypeVar

from veneer.errors import Hint, Text, VeneerWarning

_Line = TypeVar("_Line")

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep

#: What a terminal acts upon instead of showing it: control characters, separators of lines, marks of
#: direction, halves of surrogate pairs.
_ACTED_UPON = re.compile(
    "[\\x00-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]"
)


def visible(text: str, *, lines: bool = False) -> str:
    """A text that a terminal shows and does not obey: whatever it would act upon, as an escape.

    Args:
        text: From anywhere, such as a name in a file.
        lines: Keep line breaks and tabs, in a text of several lines.
    """

    def escape(found: re.Match[str]) -> str:
        if lines and found[0] in "\n\t":
            return found[0]
        return found[0].encode("unicode_escape").decode("ascii")

    return _ACTED_UPON.sub(escape, text)


def some(lines: Sequence[_Line], most: int = 20) -> list[_Line | str]:
    rest = len(lines) - most
    return [*lines[:most], f"and {rest:,} more"] if rest > 0 else list(lines)


def bullets(head: str | Text, lines: Sequence[str | Text], most: int = 20) -> Text:
    """A heading with a line below it for each of the first of many things, and how many more there are."""
    return Text.join("\n  - ", [head, *some(lines, most)])


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first of many names in a sentence, and how many more there are: ``a, b, c and 4 more``."""
    each = list(names)
    rest = len(each) - most
    return ", ".join(each[:most]) + (f" and {rest:,} more" if rest > 0 else "")


def nearest(word: object, known: Iterable[str], most: int = 1, cutoff: float = 0.6) -> list[str]:
    """The known names that are most like a word, whatever their case, and not clearly less than the best."""
    names: dict[str, str] = {}
    for name in known:
        names.setdefault(name.lower(), name)
    key = str(word)[:80].lower()
    close = difflib.get_close_matches(key, names, n=most, cutoff=cutoff)
    scores = [difflib.SequenceMatcher(None, name, key).ratio() for name in close]
    return [names[name] for name, score in zip(close, scores, strict=True) if score > scores[0] - 0.1]


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """The known name that is most like a word: `` (did you mean 'lora_alpha'?)``, or nothing."""
    near = nearest(word, known)
    return f" (did you mean {near[0]!r}?)" if near else ""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, without a full stop; the name of its type if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


def span(numbers: Collection[int]) -> str:
    """The least and the largest of some numbers: ``4`` if they are equal, else ``4–16``."""
    least, most = min(numbers, default=0), max(numbers, default=0)
    return str(least) if least == most else f"{least}–{most}"


def ranges(numbers: Sequence[int]) -> str:
    """Sorted whole numbers as text: ``0-3, 7``."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def size(count: int) -> str:
    """A number of bytes in readable units."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count} bytes"


def warn(*parts: str | Hint | Text) -> None:
    """Give a `VeneerWarning` at the line outside of Veneer that led here.

    Args:
        parts: The message, as of an error.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_ours(frame.f_code.co_filename):
        level, frame = level + 1, frame.f_back
    warnings.warn(VeneerWarning(*parts), stacklevel=level)


def _is_ours(file: str) -> bool:
    # `contextlib` stands between a decorated function of ours and its caller, `veneer_as_peft` between
    # a method of transformers and ours.
    return file.startswith(_PACKAGE) or file.endswith(("contextlib.py", "veneer_as_peft.py"))
