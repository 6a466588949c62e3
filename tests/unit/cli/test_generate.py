"""`veneer generate`: prompts from arguments and standard input, with and without the adapter."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.training.tiny import RECORDS, saved_records
from veneer.cli import main


def test_generate(adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(adapter), "--max-new-tokens", "5"]
    assert main([*words, "Double 11."]) == 0
    answer = capsys.readouterr()
    assert answer.err == ""
    assert main([*words, "Double 11.", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"prompt": "Double 11.", "generated_text": answer.out[:-1]}
    monkeypatch.setattr(sys, "stdin", io.StringIO("Double 11.\n"))
    assert main(words) == 0
    assert capsys.readouterr().out == answer.out
    assert main([*words, "Double 11.", "--base"]) == 0
    assert capsys.readouterr().out != answer.out


def lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_file_of_prompts(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = saved_records(tmp_path / "data.jsonl"), tmp_path / "out.jsonl"
    words = ["generate", str(adapter), "--data", str(data), "--max-new-tokens", "5"]
    assert main([*words, "--output", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"16 answers: {out}\n" and "answers 16/16" in captured.err
    found = lines(out.read_text())
    assert [{**record, "generated_text": ""} for record in RECORDS] == [
        {**f, "generated_text": ""} for f in found
    ]
    assert main([*words, "--batch-size", "3"]) == 0
    assert lines(capsys.readouterr().out) == found
    assert main(["generate", str(adapter), "Double 10.", "--max-new-tokens", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["generated_text"] == found[0]["generated_text"]
    assert main([*words, "--base"]) == 0
    assert lines(capsys.readouterr().out) != found
    assert main([*words, "--output", str(out)]) == 1
    assert "exists already; choose another file" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "out.jsonl"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hello", "--data", "x.jsonl"], "not both"),
        (["hello", "--output", "x.jsonl"], "--output goes with --data"),
        (["--data", "x.jsonl", "--batch-size", "0"], "Invalid value for '--batch-size'"),
        (["hello", "--top-k", "0"], "--top-k must be above 0"),
        (["hello", "--temperature", "0", "--do-sample"], "nothing to sample"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "adapter", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and said in captured.err


def test_what_cannot_work_is_said_before_the_base_is_loaded(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("veneer.training.adapters.load_base", None)
    data = saved_records(tmp_path / "data.jsonl")
    for words, said in (
        (["--data", str(tmp_path / "nowhere.jsonl")], "No such file"),
        (["--data", str(data), "--output", str(tmp_path / "no" / "where.jsonl")], "does not exist"),
        (["--data", str(data), "--output", str(tmp_path)], "is a directory"),
    ):
        assert main(["generate", str(adapter), *words]) == 1
        captured = capsys.readouterr()
        assert captured.out == "" and said in captured.err


def test_a_table_of_prompts(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.csv"
    data.write_text('prompt\n"Double\n11."\nDouble 12.\n')
    assert main(["generate", str(adapter), "--data", str(data), "--max-new-tokens", "4"]) == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert [record["prompt"] for record in lines(captured.out)] == ["Double\n11.", "Double 12."]
    assert "columns prompt (prompt)" in captured.err
