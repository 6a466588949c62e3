"""Columns that have other names in the data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from veneer import ConfigError, DataError
from veneer.training import read_records
from veneer.training.data.columns import parse_columns

ROWS = [{"question": f"{n}?", "answer": n, "prompt": "unused", "id": n} for n in range(3)]


def written(place: Path, rows: list[dict[str, object]]) -> Path:
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def test_columns_are_renamed_before_the_form_is_recognised(tmp_path: Path) -> None:
    data = written(tmp_path / "data.jsonl", ROWS)
    records = read_records(data, columns=parse_columns("prompt=question, completion = answer"))
    assert records.form.name == "prompt-completion" and records.line().endswith("not used: id")
    assert records[1] == {"prompt": "1?", "completion": 1, "id": 1}


def test_two_columns_may_change_places(tmp_path: Path) -> None:
    data = written(tmp_path / "data.jsonl", [{"prompt": "a", "completion": "b"}])
    columns = {"prompt": "completion", "completion": "prompt"}
    assert read_records(data, columns=columns) == [{"prompt": "b", "completion": "a"}]


def test_a_column_that_only_some_records_have(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"instruction": "a", "output": "b", "more": "c"},
        {"instruction": "a", "output": "b"},
    ]
    records = read_records(written(tmp_path / "data.jsonl", rows), columns={"input": "more"})
    assert records == [{"instruction": "a", "output": "b", "input": "c"}, rows[1]]


def test_missing_columns_are_all_named_with_the_nearest(tmp_path: Path) -> None:
    data = written(tmp_path / "data.jsonl", ROWS)
    with pytest.raises(DataError) as caught:
        read_records(data, columns={"prompt": "qestion", "completion": "reply"})
    assert str(caught.value) == (
        f"columns: {data} has no column 'qestion' (did you mean 'question'?), 'reply'. "
        "It has 'question', 'answer', 'prompt', 'id'"
    )


def test_bad_lines_are_said_first(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("nonsense\n")
    with pytest.raises(DataError, match="line 1: it is no JSON"):
        read_records(tmp_path / "data.jsonl", columns={"prompt": "question"})


def test_names_of_classes_follow_their_column(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"review": Value("string"), "mood": ClassLabel(names=["bad", "good"])})
    Dataset.from_dict({"review": ["a"], "mood": [1]}, features=features).to_parquet(tmp_path / "data.parquet")
    records = read_records(tmp_path / "data.parquet", "classification", {"text": "review", "label": "mood"})
    assert records == [{"text": "a", "label": 1}] and records.label_names == ["bad", "good"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("question", "columns: 'question' is no pair such as prompt=question"),
        ("prompt=", "'prompt=' is no pair"),
        (
            "promt=question",
            "'promt' is no column that is read .did you mean 'prompt'",
        ),
        ("question=prompt", r"did you mean prompt=question\?"),
        ("zzz=b", "'zzz' is no column that is read: those are messages, tools, prompt"),
        ("prompt=a,prompt=b", "'prompt' is given twice"),
        ("a,promt=b", "'a' is no pair.*; 'promt' is no column"),
    ],
)
def test_pairs_that_cannot_be_right(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_columns(text)
