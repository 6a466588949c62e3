"""Records of no form, and of different ones: what is said of their columns."""

from __future__ import annotations

import re
from typing import Any

import pytest

from veneer import DataError
from veneer.training.data.forms import Purpose
from veneer.training.data.problems import Unfit
from veneer.training.data.recognition import form_of, read_as

PLAIN = {"prompt": "Two?", "completion": "2"}


@pytest.mark.parametrize(
    ("purpose", "record", "words"),
    [
        ("sft", {"Prompt": "a", "completion": "b"}, "'Prompt' should perhaps be 'prompt'"),
        ("sft", {"mesages": []}, "'mesages' should perhaps be 'messages'"),
        ("sft", {"instruction": "a", "ouput": "b"}, "'ouput' should perhaps be 'output'"),
        ("sft", {"prompt": "a", "completion": None}, "'completion' is null"),
        ("sft", {"prompt": "a", "chosen": "b", "rejected": "c"}, "method='dpo'"),
        ("dpo", PLAIN, "data for fine-tuning on answers"),
        ("classification", {"text": "a", "lable": 1}, "'lable' should perhaps be 'label'"),
        ("sft", {"sentence": "a", "label": 1}, "data for a classifier"),
        ("sft", {"prompt": "a"}, "no answers to learn from"),
        ("sft", {}, "it has no column"),
        ("sft", {"question": "a", "answer": "b"}, r"it has 'question', 'answer'$"),
    ],
)
def test_columns_of_no_form(purpose: Purpose, record: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        form_of([record], purpose)
    line = str(caught.value).splitlines()[1]
    assert line.startswith("  record 1: it lacks columns that are needed")
    assert re.search(words, line)
    assert "Understood: {" in str(caught.value) and str(caught.value).endswith(". columns renames columns")


def test_what_is_no_record_and_no_purpose() -> None:
    with pytest.raises(DataError, match="it is no object but a list"):
        form_of([["a"]])
    with pytest.raises(DataError, match="one of dpo, kto, sft, classification, prompt, not 'ppo'"):
        form_of([PLAIN], "ppo")  # type: ignore[arg-type]


def test_most_records_decide_and_the_others_are_refused() -> None:
    form = form_of([{"text": "a"}, PLAIN, PLAIN])
    assert form.name == "prompt-completion"
    with pytest.raises(Unfit, match=r"it has the columns text .* the others have the columns prompt"):
        read_as(form, {"text": "a"})
