"""How sentences are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from veneer import wording
from veneer.errors import VeneerWarning
from veneer.wording import did_you_mean, first_line, listed, size, some, span, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model.layers.0 (été, 日本, 👩\u200d👧)", "model.layers.0 (été, 日本, 👩\u200d👧)"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("a\nb\tc\rd", "a\\nb\\tc\\rd"),
        ("\x9b31m \x7f", "\\x9b31m \\x7f"),
        ("a\u202etxt\u2066\u200f\u061c\u2028", "a\\u202etxt\\u2066\\u200f\\u061c\\u2028"),
        ("\udce9", "\\udce9"),
    ],
)
def test_what_a_terminal_would_act_upon_is_shown_as_an_escape(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_a_text_of_several_lines_keeps_them() -> None:
    assert visible("a\n\tb\x1b\r", lines=True) == "a\n\tb\\x1b\\r"


def test_the_first_of_many_and_how_many_more() -> None:
    assert listed([]) == "" and listed("ab") == "a, b" and listed(iter("abc")) == "a, b, c"
    assert listed("abcde") == "a, b, c and 2 more" and listed("abc", 1) == "a and 2 more"
    assert some(["a", "b"], 2) == ["a", "b"] and some(["x"] * 1003, 2) == ["x", "x", "and 1,001 more"]


@pytest.mark.parametrize(
    ("word", "known", "near"),
    [
        ("Lora_Alpa", ["lora_alpha", "lora_dropout"], " (did you mean 'lora_alpha'?)"),
        ("LINEAR", ["linear", "svd"], " (did you mean 'linear'?)"),
        ("nothing like it", ["linear", "svd"], ""),
        (7, ["linear"], ""),
    ],
)
def test_the_nearest_spelling(word: object, known: list[str], near: str) -> None:
    assert did_you_mean(word, known) == near


HELD = """
from contextlib import contextmanager
from veneer.errors import Hint
from veneer.wording import warn

@contextmanager
def held():
    inner()
    yield

def inner():
    warn("x ", Hint("untie", True))
"""


def test_a_warning_stands_where_the_caller_is() -> None:
    names: dict[str, Any] = {}
    exec(compile(HELD, str(Path(wording.__file__).with_name("not_there.py")), "exec"), names)
    with pytest.warns(VeneerWarning, match="^x untie=True$") as caught, names["held"]():
        pass
    assert caught[0].filename == __file__


def test_the_first_line_of_an_error() -> None:
    assert first_line(OSError("\nNo room. \nmore")) == "No room"
    assert first_line(NotImplementedError()) == "NotImplementedError"


def test_sizes() -> None:
    assert [size(n) for n in (12, 19_600_000, 269_060_552, 1_234)] == [
        "12 bytes",
        "19.6 MB",
        "269 MB",
        "1.23 kB",
    ]


def test_the_span_of_numbers() -> None:
    assert (span([4, 4]), span({16, 4}), span([])) == ("4", "4–16", "0")
