"""Regular expressions over the paths of modules, matched in a time that the length of the pattern bounds.

Python's own matcher goes back over its choices, and an expression of twenty characters can make it do so for
years. Here an expression is walked through once for all paths together, with the set of positions that it can
have reached by then. The sets are integers, one bit for each position, so that a step over a character is a
shift. What matches is what ``re.fullmatch`` matches.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
from collections.abc import Sequence
from typing import Any

_IN_RE = sys.version_info >= (3, 11)
_parser: Any = importlib.import_module("re._parser" if _IN_RE else "sre_parse")
_compiler: Any = importlib.import_module("re._compiler" if _IN_RE else "sre_compile")

#: Steps that the expressions of a configuration may take together on the same paths, some seconds. One that
#: people write takes some fifty.
STEPS = 300_000
_POSITIONS_A_STEP = 50_000  # a step over more positions counts as several

_DEEPEST = 32  # groups in groups
_TYPES = re.ASCII | re.LOCALE | re.UNICODE
_CHARACTERS = ("LITERAL", "NOT_LITERAL", "IN", "ANY")
_UNKNOWN = {
    "GROUPREF": "a reference to a group",
    "GROUPREF_EXISTS": "a condition on a group",
    "ATOMIC_GROUP": "an atomic group",
    "POSSESSIVE_REPEAT": "a possessive quantifier",
}


@functools.lru_cache(maxsize=2048)
def parsed(pattern: str) -> Any:
    """The parse tree of an expression.

    Raises:
        ValueError: If it is no regular expression, or needs what cannot be matched here.
    """
    try:
        tree = _parser.parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"is not a valid regular expression ({error})") from error
    _check(tree, 0)
    return tree


def _check(tree: Any, depth: int) -> None:
    if depth > _DEEPEST:
        raise ValueError(f"nests groups more than {_DEEPEST} deep")
    for op, argument in tree:
        if str(op) in _UNKNOWN:
            raise ValueError(f"holds {_UNKNOWN[str(op)]}, which module patterns cannot have")
        if str(op) in ("ASSERT", "ASSERT_NOT") and argument[0] < 0:
            low, high = argument[1].getwidth()
            if low != high:
                raise ValueError(
                    "is not a valid regular expression (look-behind requires fixed-width pattern)"
                )
        for part in _parts(op, argument):
            _check(part, depth + 1)


def _parts(op: Any, argument: Any) -> Sequence[Any]:
    match str(op):
        case "BRANCH":
            return argument[1]  # type: ignore[no-any-return]
        case "SUBPATTERN" | "MAX_REPEAT" | "MIN_REPEAT" | "ASSERT" | "ASSERT_NOT":
            return (argument[-1],)
    return ()


def path_ends(path: str) -> list[str]:
    """A path and its ends after each dot, the longest first."""
    ends = [path]
    while "." in path:
        path = path.partition(".")[2]
        ends.append(path)
    return ends


class TooManySteps(ValueError):
    """The expressions tried on the same paths take more steps than they may."""


class Paths:
    """Paths of modules, laid one behind the other with a gap after each.

    Args:
        paths: The paths.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = tuple(paths)
        starts, ends, at = [], [], 0
        for path in self.paths:
            starts.append(at)
            at += len(path)
            ends.append(at)
            at += 1
        self._text = "\n".join((*self.paths, ""))
        self._alphabet = set(self._text)
        self._at_end = dict(zip(ends, self.paths, strict=True))
        self._starts, self._ends = _bits(starts, at), _bits(ends, at)
        self._every = (1 << at) - 1
        self._masks: dict[Any, int] = {}
        self._price = 1 + at // _POSITIONS_A_STEP
        self._left = STEPS

    @functools.cached_property
    def ends(self) -> dict[str, list[str]]:
        return {path: path_ends(path) for path in self.paths}

    def matching(self, pattern: str, *, anywhere: bool = False) -> list[str]:
        """The paths that an expression matches from end to end.

        Args:
            pattern: The expression.
            anywhere: Let it begin after any dot of a path too.

        Raises:
            ValueError: If it is no expression that can be matched.
            TooManySteps: If it, with those that were tried on these paths before, takes more than `STEPS`.
        """
        tree = parsed(pattern)
        begin = self._starts
        if anywhere:
            begin |= self._characters(".") << 1
        reached = self._sequence(tree, begin, tree.state.flags, False) & self._ends
        digits = f"{reached:b}"[::-1]
        return [self._at_end[found.start()] for found in re.finditer("1", digits)]

    def _sequence(self, items: Any, at: int, flags: int, back: bool) -> int:
        """Where items one after the other lead to from a set of positions; with ``back``, come from."""
        for op, argument in reversed(items) if back else items:
            if not at:
                break
            self._left -= self._price
            if self._left < 0:
                raise TooManySteps
            at = self._item(str(op), argument, at, flags, back)
        return at

    def _item(self, op: str, argument: Any, at: int, flags: int, back: bool) -> int:
        if op in _CHARACTERS:
            mask = self._class(op, argument, flags)
            return (at >> 1) & mask if back else (at & mask) << 1
        if op == "BRANCH":
            reached = 0
            for branch in argument[1]:
                reached |= self._sequence(branch, at, flags, back)
            return reached
        if op == "SUBPATTERN":
            _, added, removed, body = argument
            if added & _TYPES:
                flags &= ~_TYPES
            return self._sequence(body, at, (flags | added) & ~removed, back)
        if op in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, body = argument
            return self._repeated(least, most, body, at, flags, back)
        if op in ("ASSERT", "ASSERT_NOT"):
            direction, body = argument
            holds = self._sequence(body, self._every, flags, direction > 0)
            return at & (holds if op == "ASSERT" else ~holds)
        if op == "AT":
            return at & self._anchor(str(argument), flags)
        return 0  # FAILURE: an empty (?!)

    def _repeated(self, least: int, most: int, body: Any, at: int, flags: int, back: bool) -> int:
        for _ in range(least):
            after = self._sequence(body, at, flags, back)
            if (
                after == at
            ):  # so it stays, and after as many rounds as the longest path has characters it does
                break
            at = after
        if most == _parser.MAXREPEAT and not back and len(body) == 1 and str(body[0][0]) in _CHARACTERS:
            mask = self._class(str(body[0][0]), body[0][1], flags)
            return at | (((at & mask) + mask) ^ mask)  # the carry runs through characters that follow
        new, rounds = at, least
        while new and rounds < most:
            new = self._sequence(body, new, flags, back) & ~at
            at |= new
            rounds += 1
        return at

    def _anchor(self, kind: str, flags: int) -> int:
        if kind in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return self._starts
        if kind in ("AT_END", "AT_END_STRING"):
            return self._ends
        word = self._class("IN", ((_parser.CATEGORY, _parser.CATEGORY_WORD),), flags)
        boundary = word ^ (word << 1)
        return boundary if kind == "AT_BOUNDARY" else self._every & ~boundary

    def _class(self, op: str, argument: Any, flags: int) -> int:
        """The positions of the characters that an item for one character takes."""
        key = (op, tuple(argument) if op == "IN" else argument, flags)
        if (mask := self._masks.get(key)) is None:
            state = _parser.State()
            state.flags = flags & ~re.DEBUG
            one = _compiler.compile(_parser.SubPattern(state, [(getattr(_parser, op), argument)]))
            mask = self._characters("".join(filter(one.fullmatch, self._alphabet)))
            self._masks[key] = mask
        return mask

    def _characters(self, wanted: str) -> int:
        table = {ord(c): "01"[c in wanted] for c in self._alphabet}
        return int(self._text.translate(table)[::-1] or "0", 2) & self._every & ~self._ends


def _bits(positions: Sequence[int], size: int) -> int:
    digits = bytearray(b"0") * (size + 1)
    for position in positions:
        digits[-1 - position] = ord("1")
    return int(digits, 2)
