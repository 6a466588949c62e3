"""Which form records have, what each means in plain words, and what is wrong with those that do not fit."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from veneer.training.data.forms import FORMS, PURPOSES, Purpose
from veneer.training.data.problems import Unfit
from veneer.training.data.recognition import form_of, read_as

USER, ANSWER = {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2"}
SYSTEM = {"role": "system", "content": "Be short."}
PLAIN = {"prompt": "Two?", "completion": "2"}

GOOD: list[tuple[str, Purpose, dict[str, Any], dict[str, Any]]] = [
    ("prompt-completion", "sft", PLAIN, PLAIN),
    (
        "prompt-completion",
        "sft",
        {"prompt": [USER], "completion": [ANSWER], "tools": None},
        {"messages": [USER, ANSWER]},
    ),
    ("prompt-completion", "sft", {"prompt": [USER], "completion": "2"}, {"messages": [USER, ANSWER]}),
    ("prompt-completion", "sft", {"prompt": "Two?", "completion": 2}, PLAIN),
    ("prompt-completion", "sft", {"prompt": [USER], "completion": 2}, {"messages": [USER, ANSWER]}),
    ("prompt-completion", "sft", {**PLAIN, "tools": [{"name": "f"}]}, {**PLAIN, "tools": [{"name": "f"}]}),
    ("alpaca", "sft", {"instruction": "Half?", "output": 0.5}, {"prompt": "Half?", "completion": "0.5"}),
    ("sharegpt", "sft", {"conversations": [USER, {"from": "gpt", "value": True}]},
     {"messages": [USER, {**ANSWER, "content": "true"}]}),
    ("messages", "sft", {"messages": json.dumps([USER, ANSWER]), "tools": '[{"name": "f"}]'},
     {"messages": [USER, ANSWER], "tools": [{"name": "f"}]}),
    ("messages", "sft", {"messages": [USER, ANSWER], "tools": []}, {"messages": [USER, ANSWER]}),
    ("preference", "dpo", {"prompt": "Two?", "chosen": 2, "rejected": False},
     {"prompt": "Two?", "chosen": "2", "rejected": "false"}),
    ("messages", "sft", {"messages": [SYSTEM, USER, ANSWER]}, {"messages": [SYSTEM, USER, ANSWER]}),
    ("messages", "sft", {"messages": [{**USER, "tool_calls": None}, ANSWER]}, {"messages": [USER, ANSWER]}),
    (
        "messages",
        "sft",
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f"}]}], "tools": [{"name": "f"}]},
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f"}]}], "tools": [{"name": "f"}]},
    ),
    ("messages", "sft", {**PLAIN, "messages": [USER, ANSWER]}, {"messages": [USER, ANSWER]}),
    ("alpaca", "sft", {"instruction": "Two?", "input": "", "output": "2"}, PLAIN),
    ("alpaca", "sft", {"instruction": "Add.", "input": "1, 1", "output": "2"},
     {"prompt": "Add.\n\n1, 1", "completion": "2"}),
    ("alpaca", "sft", {"instruction": "Two?", "output": "2", "system": "Be short."},
     {"messages": [SYSTEM, USER, ANSWER]}),
    (
        "sharegpt",
        "sft",
        {"conversations": [{"from": "human", "value": "Two?"}, {"from": "gpt", "value": "2"}]},
        {"messages": [USER, ANSWER]},
    ),
    ("sharegpt", "sft", {"system": "Be short.", "conversations": [USER, ANSWER]},
     {"messages": [SYSTEM, USER, ANSWER]}),
    ("text", "sft", {"text": "Once.", "label": 1}, {"text": "Once."}),
    (
        "preference",
        "dpo",
        {"prompt": "Two?", "chosen": "2", "rejected": "3"},
        {"prompt": "Two?", "chosen": "2", "rejected": "3"},
    ),
    (
        "preference-whole",
        "dpo",
        {"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "3"}], "prompt": None},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "3"}]},
    ),
    ("judged", "kto", {**PLAIN, "label": 1}, {**PLAIN, "label": True}),
    ("classification", "classification", {"text": "good", "label": 1}, {"text": "good", "label": 1}),
    ("prompt", "prompt", PLAIN, {"prompt": "Two?"}),
    ("prompt", "prompt", {"prompt": [USER], "tools": [{}]}, {"prompt": [USER], "tools": [{}]}),
    ("prompt-messages", "prompt", {"messages": [SYSTEM, USER, ANSWER]}, {"prompt": [SYSTEM, USER]}),
    ("prompt-messages", "prompt", {"messages": [USER, ANSWER, USER]}, {"prompt": [USER, ANSWER, USER]}),
    ("prompt-sharegpt", "prompt", {"conversations": [USER], "system": "Be short."},
     {"prompt": [SYSTEM, USER]}),
    ("prompt-alpaca", "prompt", {"instruction": "Add.", "input": "1"}, {"prompt": "Add.\n\n1"}),
    ("prompt-alpaca", "prompt", {"instruction": "Two?", "system": "Be short."}, {"prompt": [SYSTEM, USER]}),
    ("classification-sentence", "classification", {"sentence": "good", "label": "pos", "idx": 3},
     {"text": "good", "label": "pos"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "purpose", "record", "meaning"), GOOD)
def test_forms_and_what_they_mean(
    name: str, purpose: Purpose, record: dict[str, Any], meaning: dict[str, Any]
) -> None:
    form = form_of([record], purpose)
    assert form.name == name
    assert read_as(form, record) == meaning


def test_every_form_is_tested_and_says_its_columns() -> None:
    assert {form.name for form in FORMS} == {name for name, *_ in GOOD}
    assert str(form_of([PLAIN])) == "columns prompt + completion (instruction)"
    for form in FORMS:
        assert all(f"columns {form.columns[0]}" in str(form) for _ in form.columns)
        assert form.purpose in PURPOSES and all(f'"{column}"' in form.example for column in form.columns)


BAD: list[tuple[Purpose, dict[str, Any], str]] = [
    ("prompt", {"prompt": " "}, "prompt is empty"),
    ("prompt", {"messages": [ANSWER]}, "holds an answer only"),
    ("sft", {"prompt": 3, "completion": "a"}, r"prompt is a number \(3\), not text"),
    ("sft", {"prompt": "a", "completion": math.nan}, r"completion is a number \(nan\), not text"),
    ("sft", {"messages": "[{]"}, "messages is no JSON"),
    ("sft", {"messages": "hello"}, "messages is a text, not a list of messages"),
    ("sft", {"messages": []}, "messages is an empty list"),
    ("sft", {"messages": [None]}, r"messages\[0\] is null, not an object"),
    ("sft", {"messages": [{"role": "user"}, ANSWER]}, r"messages\[0\].content is null"),
    ("sft", {"messages": [USER]}, "no message of the role 'assistant'"),
    (
        "sft",
        {"conversations": [{"from": "humn", "value": "a"}]},
        r"from is 'humn'.*did you mean 'human'",
    ),
    ("sft", {"instruction": "a", "output": "b", "input": {}, "system": 1}, "system is a number"),
    ("sft", {"instruction": "a", "output": "b", "input": 5}, "input is a number"),
    ("sft", {"text": "half \ud800 of it"}, "half of a surrogate pair"),
    ("sft", {"messages": [USER, ANSWER], "tools": "f"}, "tools is a text, not a list"),
    ("dpo", {"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
    ("dpo", {"prompt": "a", "chosen": "b", "rejected": [ANSWER]}, "are not alike"),
    ("dpo", {"chosen": [USER], "rejected": [ANSWER]}, "do not begin alike"),
    ("dpo", {"chosen": [USER], "rejected": [USER, ANSWER]}, "holds nothing beside"),
    (
        "classification",
        {"text": "a", "label": 0.5},
        r"label is a number \(0.5\), not a name or a whole number",
    ),
    ("classification", {"text": "a", "label": True}, r"label is a boolean \(true\)"),
    ("classification", {"text": ["a"], "label": 1}, "text is a list, not text"),
]


@pytest.mark.parametrize(("purpose", "record", "words"), BAD)
def test_what_is_wrong_with_a_record(purpose: Purpose, record: dict[str, Any], words: str) -> None:
    with pytest.raises(Unfit, match=words):
        read_as(form_of([record], purpose), record)
