"""Messages with options in them: as Python writes them by default, as each face does, and never lost."""

from __future__ import annotations

import pickle

import pytest

from veneer.errors import Blank, ConfigError, Hint, MergeError, MissingExtraError, Text, VeneerWarning


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


@pytest.mark.parametrize("kind", [ConfigError, VeneerWarning])
def test_errors_and_warnings_keep_them_through_pickle(kind: type[ConfigError] | type[VeneerWarning]) -> None:
    made = pickle.loads(pickle.dumps(kind("use ", Hint("untie", True))))
    assert type(made) is kind and str(made) == "use untie=True"
    assert made.message == Text("use ", Hint("untie", True))


def test_what_needs_a_library_may_be_an_option() -> None:
    error = MissingExtraError("bitsandbytes", "quant", Hint("quantize", "nf4"))
    assert str(error).startswith("quantize='nf4' needs bitsandbytes, which is not installed: pip install")
