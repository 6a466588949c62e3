"""Messages with options in them: as Python writes them by default, as each face does, and never lost."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from veneer.errors import Blank, Hint, MergeError, MissingExtraError, Text, VeneerError, VeneerWarning


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (Hint("r"), "r"),
        (Hint("untie", True), "untie=True"),
        (Hint("dtype", "float32"), "dtype='float32'"),
        (Hint("rank", Blank("N")), "rank=N"),
        (Hint("quantize", None), "quantize=None"),
    ],
    ids=str,
)
def test_an_option_in_python(hint: Hint, words: str) -> None:
    assert str(hint) == words
    assert str(MergeError("say ", hint, ".")) == f"say {words}."


def test_a_face_writes_the_options_in_its_own_way() -> None:
    error = MergeError("w is shared", Hint("untie", True, "; {} parts it"), Hint("strict", False, "; {} too"))
    assert str(error) == "w is shared; untie=True parts it; strict=False too"
    assert error.message.written(lambda hint: {"untie": "-u"}.get(hint.option)) == "w is shared; -u parts it"


def test_what_a_face_lacks_is_written_as_in_python_where_it_stands_in_a_sentence() -> None:
    assert Text("pass ", Hint("r", 8)).written(lambda hint: None) == "pass r=8"


def test_texts_are_put_together_without_losing_their_options() -> None:
    text = Text.join("; ", [Text("a ", Hint("r")), "b", Hint("x", 1)])
    assert str(text) == "a r; b; x=1"
    assert text.parts == ("a ", Hint("r"), "; ", "b", "; ", Hint("x", 1))
    assert Text("in p: ", text).written(lambda hint: hint.option.upper()) == "in p: a R; b; X"
    assert str(Text.join(", ", [])) == ""


@pytest.mark.parametrize("lost", [Hint("r"), Text("a")], ids=type)
def test_an_f_string_would_lose_them_and_is_refused(lost: Hint | Text) -> None:
    with pytest.raises(TypeError, match="f-string"):
        f"{lost}"


def kinds(kind: type[Any]) -> list[type[Any]]:
    """A class and all that inherit from it."""
    return [kind, *(more for below in kind.__subclasses__() for more in kinds(below))]


ARGUMENTS: dict[type[Any], tuple[Any, ...]] = {MissingExtraError: ("a", "b", Hint("untie", True))}


@pytest.mark.parametrize(
    "copied", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy, copy.deepcopy]
)
@pytest.mark.parametrize("kind", [*kinds(VeneerError), VeneerWarning])
def test_every_error_survives_being_copied_and_pickled(kind: type[Any], copied: Callable[[Any], Any]) -> None:
    error = kind(*ARGUMENTS.get(kind, ("use ", Hint("untie", True))))
    error.more = "more"
    made = copied(error)
    assert type(made) is kind and str(made) == str(error) and "untie=True" in str(made)
    assert made.message == error.message and vars(made) == vars(error)


def test_what_needs_a_library_may_be_an_option() -> None:
    error = MissingExtraError("bitsandbytes", "quant", Hint("quantize", "nf4"))
    assert str(error).startswith("quantize='nf4' needs bitsandbytes, which is not installed: pip install")
