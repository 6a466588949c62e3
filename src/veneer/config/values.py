"""Checks of single values; each gives the sentences that say what is wrong, and none where all is right."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeGuard

from veneer.config.expressions import parsed
from veneer.errors import Hint, Text
from veneer.errors import show as show
from veneer.wording import did_you_mean

LARGEST_NUMBER = (2 - 2**-23) * 2.0**127  # of float32, in which strengths are computed
SMALLEST_NUMBER = 2.0**-126
LARGEST_RANK = 2**20  # above any weight matrix in use: a larger number in a file is damage or malice
PATTERNS = 250_000  # in one configuration: a name for each module of the largest models, in three options
EXPRESSIONS = 1_000  # in one configuration, and their characters together: reading them takes a second
CHARACTERS = 100_000

#: A field's name and value -> the sentences that say what is wrong with it.
Check = Callable[[str, Any], list[Text]]

_SPECIAL = frozenset(r"\^$*+?{}[]()|")
COLLECTIONS = (list, tuple, set, frozenset, Mapping)


def of_fields(owner: object, checks: Mapping[str, Check]) -> list[Text]:
    """Problems of all fields of an object."""
    return [problem for name, check in checks.items() for problem in check(name, getattr(owner, name))]


def optional(check: Check) -> Check:
    return lambda name, value: [] if value is None else check(name, value)


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number, and no boolean."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def count(name: str, value: object, least: int = 1, most: int = LARGEST_RANK) -> list[Text]:
    """Problems of an integer within bounds."""
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
        return []
    return [Text(Hint(name), f" must be an integer from {least} to {most}, got {show(value)}")]


def positive(name: str, value: Any) -> list[Text]:
    """Problems of a number above zero."""
    if is_number(value) and SMALLEST_NUMBER <= value <= LARGEST_NUMBER:
        return []
    return [Text(Hint(name), f" must be a finite number above 0 in float32, got {show(value)}")]


def fraction(name: str, value: Any) -> list[Text]:
    """Problems of a number from 0 to 1."""
    if is_number(value) and 0 <= value <= 1:
        return []
    return [Text(Hint(name), f" must be a number from 0 to 1, got {show(value)}")]


def indices(name: str, value: Any) -> list[Text]:
    """Problems of a list of whole numbers from 0 on."""
    if isinstance(value, (list, tuple)) and all(type(index) is int and 0 <= index < 2**31 for index in value):
        return []
    return [Text(Hint(name), f" must be a list of whole numbers from 0 on, got {show(value)}")]


def ranges(name: str, value: Any) -> list[Text]:
    """Problems of a list of pairs ``[start, end]``, or None."""
    if value is None or (
        isinstance(value, (list, tuple))
        and all(
            isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(n) is int for n in pair)
            for pair in value
        )
    ):
        return []
    return [Text(Hint(name), f" must be a list of pairs [start, end] or None, got {show(value)}")]


def flag(name: str, value: object) -> list[Text]:
    return [] if isinstance(value, bool) else [Text(Hint(name), f" must be True or False, got {show(value)}")]


def one_of(*known: object) -> Check:
    return lambda name, value: choice(name, value, known)


def choice(name: str, value: object, known: Iterable[object]) -> list[Text]:
    """Problems of a value out of a few."""
    known = tuple(known)
    if any(type(value) is type(k) and value == k for k in known):
        return []
    near = did_you_mean(value, map(str, known)) if isinstance(value, str) else ""
    return [Text(Hint(name), f" must be one of {', '.join(map(str, known))}; got {show(value)}{near}")]


def text(name: str, value: object) -> list[Text]:
    """Problems of a string that may be absent."""
    if value is None or isinstance(value, str):
        return []
    return [Text(Hint(name), f" must be a string or None, got {show(value)}")]


def dictionary(name: str, value: object) -> list[Text]:
    """Problems of a dictionary."""
    if isinstance(value, dict):
        return []
    return [Text(Hint(name), f" must be a dictionary, got {show(value)}")]


def dictionary_or_none(name: str, value: object) -> list[Text]:
    """Problems of a dictionary that may be absent."""
    if value is None or isinstance(value, dict):
        return []
    return [Text(Hint(name), f" must be a dictionary or None, got {show(value)}")]


def is_names(value: object) -> bool:
    return isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(v, str) and v for v in value)


def looks_like_regex(pattern: str) -> bool:
    """Whether a pattern is a regular expression: it holds a special character other than a path's dot."""
    return not _SPECIAL.isdisjoint(pattern)


def name_in(pattern: str) -> str | None:
    r"""The name that a pattern is, anchored or with its dots escaped (``^a\.b$``); None for an expression."""
    if not looks_like_regex(pattern):
        return pattern
    name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    return None if looks_like_regex(name) else name


def too_many_patterns(options: Mapping[str, object]) -> list[Text]:
    """Problems of more patterns than a configuration may have, given its options that hold patterns."""
    given = {
        name: [value] if isinstance(value, str) else [p for p in value if isinstance(p, str)]
        for name, value in options.items()
        if isinstance(value, (str, *COLLECTIONS))
    }
    total = sum(map(len, given.values()))
    if total > PATTERNS:
        name = max(given, key=lambda name: len(given[name]))
        return [
            Text(
                Hint(name),
                f" holds {len(given[name]):,} patterns, such as {show(given[name][0])}: all in all there are "
                f"{total:,}, and a configuration may have {PATTERNS:,}",
            )
        ]
    found = {name: [p for p in patterns if name_in(p) is None] for name, patterns in given.items()}
    number = sum(map(len, found.values()))
    length = sum(len(p) for patterns in found.values() for p in patterns)
    if number <= EXPRESSIONS and length <= CHARACTERS:
        return []
    name = max(found, key=lambda name: sum(map(len, found[name])))
    such = f"{len(found[name]):,}, such as {show(max(found[name], key=len))}"
    return [
        Text(
            Hint(name),
            f" holds regular expressions ({such}), which with those of other options are {number:,} of "
            f"{length:,} characters; a configuration may have {EXPRESSIONS:,} of {CHARACTERS:,} characters. "
            "List the modules by name, which costs nothing",
        )
    ]


def expression(name: str, pattern: str) -> list[Text]:
    """Problems of a pattern that is a regular expression."""
    if name_in(pattern) is not None:
        return []
    try:
        parsed(pattern)
    except ValueError as error:
        return [Text(Hint(name), f": {show(pattern)} {error}")]
    return []


def patterns(name: str, value: object) -> list[Text]:
    """Problems of ``target_modules``-like fields: None, a pattern, or several."""
    if value is None:
        return []
    if isinstance(value, str):
        return expression(name, value) if value else [Text(Hint(name), " is an empty string")]
    if not is_names(value):
        return [Text(Hint(name), f" must be a string or a list of non-empty strings, got {show(value)}")]
    return [p for v in sorted(value) for p in expression(name, v)]  # type: ignore[call-overload]


def by_pattern(check: Check) -> Check:
    return lambda name, value: pattern_values(name, value, check)


def pattern_values(name: str, value: object, check: Check) -> list[Text]:
    """Problems of a dictionary from patterns to numbers."""
    if not isinstance(value, Mapping):
        return [Text(Hint(name), f" must be a dictionary from module patterns to numbers, got {show(value)}")]
    found = []
    for key, number in value.items():
        if not isinstance(key, str) or not key:
            found.append(Text(Hint(name), f": every key must be a non-empty string, got {show(key)}"))
            continue
        found += expression(name, key)
        if check(name, number):
            found += check(f"{name}[{show(key)}]", number)
    return found
