"""Texts and labels -> rows of a classifier."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.training.tiny import tiny_tokenizer
from veneer import DataError
from veneer.training import LabelCollator, Records, encode_classification
from veneer.training.data import form_of

TOKENIZER = tiny_tokenizer()


def records(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": "x" * (n + 1), "label": label} for n, label in enumerate(labels)]


def test_labels_that_are_names() -> None:
    encoded = encode_classification(records("spam", "ham", "spam"), TOKENIZER)
    assert encoded.label_names == ["ham", "spam"]
    assert [row["labels"] for row in encoded.rows] == [1, 0, 1]
    assert encoded.rows[2]["input_ids"] == TOKENIZER("xxx")["input_ids"]
    assert encoded.lines() == ["3 examples: ham 1, spam 2"]


def test_labels_that_are_numbers_are_in_the_order_of_numbers() -> None:
    encoded = encode_classification(records(10, 2, 9), TOKENIZER)
    assert encoded.label_names == ["2", "9", "10"]
    assert [row["labels"] for row in encoded.rows] == [2, 0, 1]


def test_the_names_that_a_source_tells() -> None:
    told = records(1, 0)
    known = Records(
        told, source="data", form=form_of(told, "classification"), label_names=["bad", "good", "?"]
    )
    encoded = encode_classification(known, TOKENIZER)
    assert encoded.label_names == ["bad", "good", "?"] and [row["labels"] for row in encoded.rows] == [1, 0]


def test_the_classes_of_a_model() -> None:
    encoded = encode_classification(records("b", 0, "b"), TOKENIZER, label_names=["a", "b"])
    assert [row["labels"] for row in encoded.rows] == [1, 0, 1]
    with pytest.raises(
        DataError, match=r"1 of 2 records[^\n]*\n  record 2: label 'spma' is no class.*'spam'"
    ):
        encode_classification(records("ham", "spma"), TOKENIZER, label_names=["ham", "spam"])
    with pytest.raises(DataError, match="label -1 is no class"):
        encode_classification(records(-1, 0), TOKENIZER, label_names=["ham", "spam"])


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (("a", "a"), "two classes or more; all labels are 'a'"),
        ((1, "1"), "some labels are texts and some numbers"),
    ],
)
def test_labels_that_teach_nothing(labels: tuple[Any, ...], words: str) -> None:
    with pytest.raises(DataError, match=words):
        encode_classification(records(*labels), TOKENIZER)


def test_long_texts_are_cut_and_counted() -> None:
    encoded = encode_classification(records(*"abcdabcdabcd"), TOKENIZER, max_length=10)
    assert encoded.cut == 2 and max(len(row["input_ids"]) for row in encoded.rows) == 10
    assert encoded.lines()[1] == "warning: 2 examples longer than 10 tokens were cut"


def test_many_classes_are_said_in_short() -> None:
    line = encode_classification(records(*range(12)), TOKENIZER).lines()[0]
    assert line.endswith("7 1, … (12 classes)")


def test_the_collator() -> None:
    batch = LabelCollator(pad=3)([{"input_ids": [5], "labels": 1}, {"input_ids": [6, 7], "labels": 0}])
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 3], [6, 7]],
        "attention_mask": [[1, 0], [1, 1]],
        "labels": [1, 0],
    }
