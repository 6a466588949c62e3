"""Records of each purpose are encoded for it; rows are set aside by share and seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.training.tiny import RECORDS, tiny_tokenizer
from veneer import DataError
from veneer.training import encode, encode_classification, encode_preferences, read_records
from veneer.training.data.forms import Purpose
from veneer.training.data.rows import encode_records, longest_example, set_aside

TOKENIZER = tiny_tokenizer()


def test_each_purpose_is_encoded_by_its_own_function(tmp_path: Path) -> None:
    classes = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    table: list[tuple[str, Purpose, object, list[dict[str, str]]]] = [
        ("sft", "sft", encode, RECORDS),
        ("sft", "classification", encode_classification, classes),
        ("dpo", "dpo", encode_preferences, pairs),
    ]
    for method, purpose, own, rows in table:
        (tmp_path / "data.json").write_text(json.dumps(rows))
        records = read_records(tmp_path / "data.json", purpose)
        assert encode_records(records, TOKENIZER, 64, method) == own(records, TOKENIZER, 64)  # type: ignore[operator]


def test_a_model_may_take_less_than_what_is_asked_for() -> None:
    short = tiny_tokenizer()
    short.model_max_length = 32
    assert (longest_example(short, 1024), longest_example(short, 8)) == (32, 8)
    assert longest_example(object(), 8) == 8


def test_rows_are_set_aside_by_share_and_seed() -> None:
    rows = list(range(100))
    trained, held = set_aside(rows, 0.05, seed=0)
    assert len(held) == 5 and sorted(trained + held) == rows
    assert trained == sorted(trained) and held == sorted(held)
    assert set_aside(rows, 0.05, seed=0) == (trained, held)
    assert set_aside(rows, 0.05, seed=1)[1] != held
    assert len(set_aside(rows[:3], 0.01, seed=0)[1]) == 1


@pytest.mark.parametrize(("number", "share"), [(1, 0.5), (4, 0.99)])
def test_something_is_left_to_train_on(number: int, share: float) -> None:
    with pytest.raises(DataError, match=rf"validation_split={share} of {number} examples? leaves nothing"):
        set_aside(range(number), share, seed=0)
