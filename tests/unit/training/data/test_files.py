"""Files of each type -> records with their places; files that cannot be read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.unit.training.tiny import RECORDS, saved_records, tiny_tokenizer
from veneer import DataError
from veneer.training import encode, read_records


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff", "[]"])
@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_files_without_records(tmp_path: Path, content: str, name: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError):
        read_records(tmp_path / name)


def test_separators_inside_strings_and_a_byte_order_mark_are_data(tmp_path: Path) -> None:
    text = json.dumps({"prompt": "a\u2028b\u0085c", "completion": "d"}, ensure_ascii=False)
    (tmp_path / "d.jsonl").write_text(f"\ufeff{text}\r\n\r\n", encoding="utf-8", newline="")
    assert read_records(tmp_path / "d.jsonl")[0]["prompt"] == "a\u2028b\u0085c"


def test_a_json_list_and_jsonl_by_another_name(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps(RECORDS, indent=1))
    assert read_records(tmp_path / "list.json") == RECORDS
    assert read_records(saved_records(tmp_path / "lines.json")) == RECORDS
    (tmp_path / "bad.json").write_text('[{"prompt": "a",\n')
    with pytest.raises(DataError, match=r"bad\.json is no JSON"):
        read_records(tmp_path / "bad.json")


def test_csv_cells_stay_the_texts_that_they_are(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_bytes(
        b'\xef\xbb\xbfprompt, completion\r\n007,"1,5 ""is""\r\nmore"\r\n\r\nnull,NA\r\n"'
        + b"x" * 200_000
        + b'",1\r\n'
    )
    records = read_records(file)
    assert records[0] == {"prompt": "007", "completion": '1,5 "is"\r\nmore'}
    assert records[1] == {"prompt": "null", "completion": "NA"}
    assert len(records[2]["prompt"]) == 200_000
    assert [records.where(n) for n in range(3)] == ["line 2", "line 5", "line 6"]


@pytest.mark.parametrize(("mark", "name"), [(";", "data.csv"), ("\t", "data.tsv"), ("\t", "data.csv")])
def test_other_marks_between_cells(tmp_path: Path, mark: str, name: str) -> None:
    (tmp_path / name).write_text(f"prompt{mark}completion\na, b{mark}c\n")
    assert read_records(tmp_path / name) == [{"prompt": "a, b", "completion": "c"}]


def test_conversations_in_csv_are_json(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    cell = json.dumps(messages).replace('"', '""')
    (tmp_path / "data.csv").write_text(f'id,messages\n1,"{cell}"\n')
    records = read_records(tmp_path / "data.csv")
    assert records == [{"id": "1", "messages": json.dumps(messages)}]
    assert len(encode(records, tiny_tokenizer()).rows) == 1
    (tmp_path / "data.csv").write_text('id,messages\n1,"[{]"\n')
    with pytest.raises(DataError, match="line 2: messages is no JSON"):
        read_records(tmp_path / "data.csv")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            "prompt,completion\na,b\nc\nd,e,f\n",
            "line 3: it has 1 field where the header has 2\n  line 4: it has 3",
        ),
        ("prompt,prompt,completion\na,b,c\n", "more than one column 'prompt'"),
        ('prompt,completion\na,"b\n', "is no CSV"),
        ("promt,completion\na,b\n", "'promt' should perhaps be 'prompt'"),
        ("prompt,completion\n", "holds no records"),
        ("", "holds no records"),
    ],
)
def test_bad_csv(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "data.csv").write_text(content)
    with pytest.raises(DataError, match=re.escape(words)):
        read_records(tmp_path / "data.csv")


def test_parquet_with_names_of_classes(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    data = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    data.to_parquet(tmp_path / "data.parquet")
    data.save_to_disk(tmp_path / "saved")
    for place in (tmp_path / "data.parquet", tmp_path / "saved"):
        records = read_records(place, "classification")
        assert records == [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
        assert records.label_names == ["bad", "good"]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(DataError, match=r"bad\.parquet is no Parquet file"):
        read_records(tmp_path / "bad.parquet")


@pytest.mark.parametrize("metadata", [None, b"not json", b'{"info": 3}'])
def test_parquet_that_datasets_does_not_know(tmp_path: Path, metadata: bytes | None) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {"prompt": pyarrow.array(["a", "b"])}
    if metadata is None:
        columns["more"] = pyarrow.array([[("x", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    table = pyarrow.table(columns)
    if metadata is not None:
        table = table.replace_schema_metadata({b"huggingface": metadata})
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    assert [record["prompt"] for record in read_records(tmp_path / "data.parquet", "prompt")] == ["a", "b"]


def test_parquet_with_texts_that_are_none(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = pyarrow.array([b"\xff"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": texts}), tmp_path / "data.parquet")
    with pytest.raises(DataError, match=r"data\.parquet has values that cannot be read: 'utf-8' codec"):
        read_records(tmp_path / "data.parquet", "prompt")


def test_nulls_of_columns_that_a_table_has_for_other_rows(tmp_path: Path) -> None:
    from datasets import Dataset

    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows: list[dict[str, Any]] = [
        {"messages": messages, "tools": None},
        {"messages": [{"role": "tool", "content": "x", "name": "f"}, *messages], "tools": None},
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "data.parquet")
    assert len(encode(read_records(tmp_path / "data.parquet"), tiny_tokenizer()).rows) == 2


def test_an_object_with_one_list_of_records(tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    for content in ({"data": RECORDS}, {"version": 1, "tags": ["a"], "rows": RECORDS, "errors": []}):
        file.write_text(json.dumps(content, indent=1))
        records = read_records(file)
        assert records == RECORDS and records.where(2) == "record 3"
    file.write_text(json.dumps({"train": RECORDS, "test": RECORDS}))
    with pytest.raises(DataError, match=r"holds 2 lists of records: 'train', 'test'\. Save each as a file"):
        read_records(file)


def test_an_object_that_is_one_record(tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file.write_text(json.dumps({"messages": turns}, indent=1))
    assert read_records(file) == [{"messages": turns}]
    file.write_text(json.dumps({"conversations": [{"messages": turns}]}))
    assert read_records(file) == [{"messages": turns}]
    file.write_text(json.dumps({"promt": "a", "data": []}, indent=1))
    with pytest.raises(DataError, match="'promt' should perhaps be 'prompt'"):
        read_records(file)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("book.txt", "is a text file"),
        ("book.md", "is a text file"),
        ("sheet.xlsx", r"of the unknown type \.xlsx"),
    ],
)
def test_types_that_are_not_read(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("Once upon a time.\n")
    with pytest.raises(
        DataError, match=rf"{words}\. Types that are read: \.jsonl, \.json, \.csv, \.tsv, \.parq"
    ):
        read_records(tmp_path / name)


def test_nulls_that_a_table_has_inside_of_objects(tmp_path: Path) -> None:
    from datasets import Dataset

    tools = [
        {"name": "f", "parameters": {"a": {"type": "int"}}},
        {"name": "g", "parameters": {"b": {"type": "int"}}},
    ]
    Dataset.from_list([{"text": "a", "tools": tools, "prompt": None}]).to_parquet(tmp_path / "data.parquet")
    assert read_records(tmp_path / "data.parquet") == [{"text": "a", "tools": tools, "prompt": None}]
