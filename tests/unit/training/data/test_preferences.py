"""Pairs of answers, laid out as the model is asked later."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.training.tiny import tiny_tokenizer
from veneer import DataError
from veneer.training import encode_preferences

TEXTS = {"prompt": "Two?", "chosen": "2", "rejected": "three"}
USER = {"role": "user", "content": "Two?"}
BETTER, WORSE = ({"role": "assistant", "content": text} for text in ("2", "three"))
WHOLE = {"chosen": [USER, BETTER], "rejected": [USER, WORSE]}
TURNS = {"prompt": [USER], "chosen": [BETTER], "rejected": [WORSE]}


@pytest.mark.parametrize("record", [TEXTS, WHOLE, TURNS, {**TEXTS, "prompt": [USER]}])
def test_all_forms_become_turns_where_there_is_a_chat_template(record: dict[str, Any]) -> None:
    assert encode_preferences([record], tiny_tokenizer()).rows == [TURNS]


def test_texts_stay_texts_where_there_is_none() -> None:
    plain = tiny_tokenizer(template=None)
    assert encode_preferences([TEXTS], plain).rows == [TEXTS]
    with pytest.raises(DataError, match="no chat template, so messages cannot be laid out"):
        encode_preferences([WHOLE], plain)


def test_long_pairs_are_counted() -> None:
    plain = tiny_tokenizer(template=None)
    short = {"prompt": "a", "chosen": "b", "rejected": "c"}
    found = encode_preferences([TEXTS, short, short], plain, max_length=8)
    assert found.cut == 1
    assert found.lines() == ["3 pairs of answers", "warning: 1 pair longer than 8 tokens was cut"]


def test_a_reward_is_one_of_a_whole_answer() -> None:
    found = encode_preferences([TEXTS, {**TEXTS, "chosen": "2" * 99}], tiny_tokenizer(), 60, "reward")
    assert found.rows == [TURNS]
    assert found.lines()[1] == "warning: 1 pair longer than 60 tokens was left out"


def test_answers_with_a_judgement() -> None:
    good = {"prompt": "Two?", "completion": "2", "label": 1}
    found = encode_preferences([good, {**good, "label": False}], tiny_tokenizer(), method="kto")
    assert found.rows[0] == {"prompt": [USER], "completion": [BETTER], "label": True}
    assert found.lines() == ["2 answers: 1 good, 1 bad"]
    assert (
        "all answers are judged alike"
        in encode_preferences([good], tiny_tokenizer(), method="kto").lines()[1]
    )
    with pytest.raises(DataError, match=r"label is a text, not true \(a good answer\) or false"):
        encode_preferences([{**good, "label": "yes"}], tiny_tokenizer(), method="kto")
    with pytest.raises(DataError, match="answers that are good or bad: train on them with method='kto'"):
        encode_preferences([good], tiny_tokenizer())


def test_trl_takes_the_rows() -> None:
    from datasets import Dataset
    from trl.data_utils import is_conversational

    for tokenizer, talks in ((tiny_tokenizer(), True), (tiny_tokenizer(template=None), False)):
        rows = encode_preferences([TEXTS], tokenizer).rows
        assert is_conversational(Dataset.from_list(rows)[0]) is talks
