"""Files, directories and ids -> records of one form; one error for all that is wrong with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.unit.training.tiny import RECORDS, saved_records, tiny_tokenizer
from veneer import DataError
from veneer.training import encode, read_records

NEEDED = '{"prompt": "a", "completion": "b"}\n'


def test_a_good_file_is_read(tmp_path: Path) -> None:
    records = read_records(saved_records(tmp_path / "data.jsonl"))
    assert records == RECORDS
    assert records.form.name == "prompt-completion" and records.where(3) == "line 4"
    assert (
        records.line() == f"16 records from {tmp_path}/data.jsonl: columns prompt + completion (instruction)"
    )


def test_columns_that_are_not_used_are_said(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"instruction": "a", "output": "b", "inpt": "c", "id": 3}\n')
    line = read_records(file).line()
    assert line.startswith("1 record from ")
    assert line.endswith("(Alpaca); not used: id, inpt ('inpt' should perhaps be 'input')")


def test_all_bad_lines_are_in_one_error(tmp_path: Path) -> None:
    lines = ['{"prompt": ', '{"promt": "a", "completion": "b"}', NEEDED, '{"prompt": 3, "completion": "b"}',
             '{"text": "a"}', "", '["a"]', '{"prompt": 3, "completion": "c"}']  # fmt: skip
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        read_records(file)
    said = str(caught.value).splitlines()
    assert said[0] == f"6 of 7 records of {file} cannot be used:"
    assert said[1].startswith("  line 1: it is no JSON (")
    assert said[2].startswith("  line 2: it lacks columns that are needed: it has 'promt', 'completion'")
    assert said[3] == "  line 5: prompt is a number (3), not text (and 1 more like it)"
    assert said[4] == "  … and 2 more" and said[5].startswith("Understood: ")


def test_files_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_records(tmp_path / "nowhere.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"{}\xff\xfe\x00")
    with pytest.raises(DataError, match=r"no UTF-8 text \(byte 2\)"):
        read_records(tmp_path / "bytes.jsonl")
    (tmp_path / "deep.jsonl").write_text("[" * 200_000 + "]" * 200_000)
    with pytest.raises(DataError, match="nested too deeply"):
        read_records(tmp_path / "deep.jsonl")


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.jsonl").write_text("{}")

    def fails(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", fails)
    with pytest.raises(DataError, match=r"cannot read the data file .*data\.jsonl: Permission denied"):
        read_records(tmp_path / "data.jsonl")


def test_a_directory_of_files(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "validation.jsonl"):
        (tmp_path / "data" / name).write_text(json.dumps({"text": name}) + "\n")
    (tmp_path / "README.md").write_text("# data")
    (tmp_path / ".hidden.jsonl").write_text("nonsense")
    records = read_records(tmp_path)
    assert [record["text"][:11] for record in records] == ["train-00000", "train-00001"]
    assert records.where(1) == "data/train-00001-of-00002.jsonl, line 1"
    assert read_records(f"{tmp_path}:validation") == [{"text": "validation.jsonl"}]
    with pytest.raises(DataError, match="holds no split 'test': it has train, validation"):
        read_records(f"{tmp_path}:test")


def test_directories_without_splits_or_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no data: looked for \.jsonl"):
        read_records(tmp_path)
    for name in ("a.jsonl", "b.csv"):
        (tmp_path / name).write_text("text\nfrom b\n" if name == "b.csv" else '{"text": "from a"}\n')
    assert [record["text"] for record in read_records(tmp_path)] == ["from a", "from b"]
    with pytest.raises(DataError, match="2 files of no split"):
        read_records(f"{tmp_path}:test")


def test_saved_data_sets_have_splits(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    parts = {name: Dataset.from_list([{"text": name}]) for name in ("train", "test")}
    DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert read_records(tmp_path / "saved") == [{"text": "train"}]
    assert read_records(f"{tmp_path / 'saved'}:test") == [{"text": "test"}]
    with pytest.raises(DataError, match="no split 'dev' but train, test"):
        read_records(f"{tmp_path / 'saved'}:dev")
    shutil.rmtree(tmp_path / "saved" / "train")
    with pytest.raises(DataError, match=r"the data set in .*saved cannot be read"):
        read_records(tmp_path / "saved")


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("imdb", ("imdb", None, "train")),
        ("imdb:test[:5%]", ("imdb", None, "test[:5%]")),
        ("stanfordnlp/imdb", ("stanfordnlp/imdb", None, "train")),
        ("nyu-mll/glue/sst2:validation", ("nyu-mll/glue", "sst2", "validation")),
    ],
)
def test_ids_of_the_hub(name: str, asked: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def load_dataset(path: str, config: str | None, split: str) -> Any:
        calls.append((path, config, split))
        return datasets.Dataset.from_list([{"text": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_records(name) == [{"text": "a"}]
    assert calls == [asked]


def test_a_hub_that_does_not_answer_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*arguments: Any, **more: Any) -> Any:
        raise ConnectionError("Couldn't reach 'org/data' on the Hub (LocalEntryNotFoundError)\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError) as caught:
        read_records("org/data:test")
    assert str(caught.value) == (
        "'org/data' is no file or directory here, and as a data set of the hub it cannot be had "
        "(split 'test'): Couldn't reach 'org/data' on the Hub (LocalEntryNotFoundError). "
        "Check the name and the network, or give a file."
    )


@pytest.mark.parametrize("name", ["org/data", "data:test", "org/data/part"])
def test_an_unreachable_hub_is_asked_once(name: str, unreachable_hub: str) -> None:
    with pytest.raises(DataError, match=f"cannot be had .*the hub at {unreachable_hub} does not answer"):
        read_records(name)


@pytest.mark.parametrize(
    "name",
    "data.jsonl data.txt data.jsonl:test ./data ~/data /data/here a/b.csv a/b/c.txt \\b a//b a/b/c/d".split(),
)
def test_missing_files_never_become_ids(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(DataError, match=r"No such file|neither a file"):
        read_records(name)


def test_errors_of_encoding_name_the_line(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    bad = {"messages": [{"role": "clown", "content": "a"}, {"role": "assistant", "content": "b"}]}
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    file.write_text("\n\n" + json.dumps(good) + "\n" + json.dumps(bad) + "\n")
    strict = tiny_tokenizer(
        "{% for m in messages %}{% if m['role'] == 'clown' %}{{ raise_exception('no clowns') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(DataError) as caught:
        encode(read_records(file), strict)
    assert str(caught.value).splitlines() == [
        f"1 of 2 records of {file} cannot be used:",
        "  line 4: the model's chat template refuses the roles clown: no clowns",
    ]
