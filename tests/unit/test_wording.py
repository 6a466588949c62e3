"""How sentences are made."""

from __future__ import annotations

import pytest

from veneer.wording import listed, some, visible


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
