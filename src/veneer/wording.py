"""How sentences are made, once for all of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

_Line = TypeVar("_Line")

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
    """The first of many lines, and how many more there are."""
    rest = len(lines) - most
    return [*lines[:most], f"and {rest:,} more"] if rest > 0 else list(lines)


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first of many names in a sentence, and how many more there are: ``a, b, c and 4 more``."""
    each = list(names)
    rest = len(each) - most
    return ", ".join(each[:most]) + (f" and {rest:,} more" if rest > 0 else "")
