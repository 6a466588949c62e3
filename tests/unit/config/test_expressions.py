"""Expressions over paths: what Python's own matcher matches, in a time that is bounded."""

from __future__ import annotations

import re
import sys

import hypothesis
import pytest
from hypothesis import strategies as st

from veneer.config.expressions import Paths, TooManySteps, parsed

characters = st.sampled_from(
    [
        "a",
        "b",
        "c",
        r"\.",
        ".",
        r"\d",
        r"\w",
        r"\W",
        "[ab]",
        "[^a.]",
        "[a-c0-3]",
        "0",
        "1",
        "_",
        "A",
        r"[^\d]",
    ]
)
places = st.sampled_from(["^", "$", r"\b", r"\B", r"\A", r"\Z"])
looking_back = st.sampled_from(["(?<=a)", r"(?<!\.)", "(?<=ab)", "(?<![ab])", "(?<=a|b)"])
counts = st.sampled_from(["*", "+", "?", "*?", "+?", "{2}", "{1,2}", "{0,3}", "{2,}", "{3}?"])


def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    groups = st.sampled_from(["(?:", "(", "(?=", "(?!", "(?i:", "(?a:", "(?s:"])
    return st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
        st.builds("(?:{}){}".format, inner, counts),
        st.builds("{}{})".format, groups, inner),
    )


expressions = st.builds(
    "{}{}".format,
    st.sampled_from(["", "", "", "(?i)"]),
    st.recursive(st.one_of(characters, characters, places, looking_back), larger, max_leaves=12),
)
paths = st.lists(st.text("aabbc.01A_é", min_size=1, max_size=8), min_size=1, max_size=8, unique=True)


@hypothesis.given(expressions, paths)
def test_what_matches_is_what_fullmatch_matches(expression: str, given: list[str]) -> None:
    expected = [path for path in given if re.fullmatch(expression, path)]
    assert Paths(given).matching(expression) == expected


@hypothesis.given(expressions.filter(lambda e: not e.startswith("(?i)")), paths)
def test_anywhere_is_after_any_dot(expression: str, given: list[str]) -> None:
    expected = [path for path in given if re.fullmatch(rf"(?:.*\.)?(?:{expression})", path)]
    assert Paths(given).matching(expression, anywhere=True) == expected


LLAMA = [
    f"model.layers.{i}.{name}"
    for i in range(4)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "input_layernorm")
]


@pytest.mark.parametrize(
    ("expression", "count"),
    [
        (r".*\.(q_proj|o_proj)", 8),
        (r"^(?!.*layernorm).*layers\.\d+\..*$", 12),
        (r"model\.layers\.(0|[2-3])\.self_attn\..*_proj", 6),
        (r".*\b(?<!self_)attn.*", 0),
        (r"(?i).*Q_PROJ", 4),
        (r".*\.\d{1,2}\.mlp\..+", 4),
    ],
)
def test_expressions_that_people_write(expression: str, count: int) -> None:
    assert len(Paths(LLAMA).matching(expression)) == count
    assert Paths(LLAMA).matching(expression) == [p for p in LLAMA if re.fullmatch(expression, p)]


#: Python's own matcher takes years for most of these.
WILD = {
    "nested": "([a-z0-9._]+)+!",
    "same branches": "(.|.)*!",
    "overlapping branches": "(l|la|a|.)*!",
    "any of any": "(.*)*!",
    "many stars": "(.*a){25}!",
    "optional": ".?" * 40 + "." * 40 + "!",
    "polynomial": r"[^!]+" * 30 + "!",
    "look ahead": "(?=(.*)*!).*",
    "look ahead negative": "(?!([a-z0-9._]+)+!)x",
    "counted": "(.{1,300}){1,300}!",
    "counted twice": "((.?){1,999}){1,999}!",
    "deep": "(((((((a|.)*c)*d)*e)*f)*g)*h)*!",
    "huge count": "(?:(?:a?){1000000}){1000000}!",
}


@pytest.mark.parametrize("expression", WILD.values(), ids=WILD)
def test_no_expression_takes_for_ever(expression: str) -> None:
    long = ["model." + "layers.0." * 40, "a" * 400, *LLAMA]
    assert Paths(long).matching(expression) == []


def test_steps_are_counted_and_run_out() -> None:
    paths = Paths(["model." + "a" * 400])
    with pytest.raises(TooManySteps):
        paths.matching("(?:" * 20 + ".{2}" + ")+.)+" * 10 + "!")
    with pytest.raises(TooManySteps):  # on these paths nothing is tried any more
        paths.matching(".*a")
    assert Paths(["model.a"]).matching(".*a") == ["model.a"]


NEW = [("a++b", "a possessive quantifier"), ("(?>a)b", "an atomic group")]


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("(", "is not a valid regular expression (missing ), unterminated subpattern"),
        ("(?<=a+)b", "is not a valid regular expression (look-behind requires fixed-width pattern)"),
        (r"(.*)\.\1", "holds a reference to a group, which module patterns cannot have"),
        ("(a)?(?(1)b|c)", "holds a condition on a group"),
        *((p, f"holds {what}") for p, what in NEW if sys.version_info >= (3, 11)),
        ("(" * 40 + "a" + ")" * 40, "nests groups more than 32 deep"),
        ("(" * 100_000, "is not a valid regular expression"),
    ],
)
def test_what_is_refused(expression: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        parsed(expression)
