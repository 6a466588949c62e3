"""Dataclasses whose fields say what their values may be."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import Hint, Text
from ..wording import did_you_mean

T = TypeVar("T")

#: Name of a bound -> its words, and whether a value keeps it. NaN keeps none.
BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "above": ("above", lambda value, bound: value > bound),
    "least": ("at least", lambda value, bound: value >= bound),
    "below": ("below", lambda value, bound: value < bound),
    "most": ("at most", lambda value, bound: value <= bound),
}


def bounded(default: T, **about: Any) -> T:
    """A field of a dataclass.

    Args:
        default: Its default.
        about: Its metadata: the bounds of a number (``above``, ``least``, ``below``, ``most``), or the
            ``choices``, if they can be listed.
    """
    value: T = dataclasses.field(default=default, metadata=about)
    return value


def wrong_values(options: Any) -> list[Text]:
    """The values of a dataclass that its fields rule out, a sentence each. None is never ruled out."""
    wrong = []
    for part in dataclasses.fields(options):
        value, choices = getattr(options, part.name), part.metadata.get("choices")
        bounds = {name: part.metadata[name] for name in BOUNDS if name in part.metadata}
        if value is None:
            continue
        if choices and value not in choices:
            said = f" is one of {', '.join(choices)}, not {value!r}{did_you_mean(value, choices)}"
            wrong.append(Text(Hint(part.name), said))
        infinite = isinstance(value, float) and math.isinf(value)
        if infinite or not all(BOUNDS[name][1](value, bound) for name, bound in bounds.items()):
            limits = [f"{BOUNDS[name][0]} {bound}" for name, bound in bounds.items()]
            words = " and ".join([*limits, *(["finite"] if infinite else [])])
            wrong.append(Text(Hint(part.name), f" must be {words}, not {value}"))
    return wrong
