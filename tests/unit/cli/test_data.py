"""`veneer data`: what a run would train on, as text and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.training.tiny import saved_records
from veneer.cli import main


def test_data(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = saved_records(tmp_path / "data.jsonl")
    assert main(["data", str(file), "--model", str(base), "--rows", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and "\x1b" not in captured.out
    assert captured.out.splitlines() == [
        f"16 records from {file}: columns prompt + completion (instruction)",
        "16 examples, 272 tokens, loss on 48 of them",
        "",
        "Between [[ and ]]: what counts in the loss.",
        "example 1:",
        "<|user|>Double 10.<|end|>",
        "<|assistant|>[[20<|end|>]]",
        "",
        "Tokens of an example: 17 at least, 17 in the median, 17 at most",
        f"  {'tokens':>16}  {'examples':>8}",
        f"  {'17':>16}  {'16':>8}  {'█' * 40}",
        "",
        "Nothing is cut at 1,024 tokens",
        "No duplicates",
    ]


def test_data_in_colour(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    words = ["data", str(saved_records(tmp_path / "data.jsonl")), "--model", str(base)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "Green: what counts" in shown and "\x1b[32m20<|end|>\x1b[0m" in shown and "[[" not in shown


def test_data_as_json_of_a_configuration(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.csv").write_text("question,answer\nTwo?,2\nTwo?,2\n")
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {base}\ndata: {tmp_path}/data.csv\nmax_length: 10\nlearning_rate: 1e-3\n"
        "columns: {prompt: question, completion: answer}\n"
    )
    assert main(["data", str(config), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cut"] == [] and found["duplicates"] == [["line 2", "line 3"]]
    assert found["shown"][0][-1] == {"text": "2<|end|>", "counted": True}
    assert main(["data", str(config), "--json", "--max-length", "9"]) == 0
    assert json.loads(capsys.readouterr().out)["cut"] == ["line 2", "line 3"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["nowhere.jsonl", "--model", "BASE"], 1, "cannot read the data file nowhere.jsonl"),
        (["EMPTY", "--model", "BASE"], 1, "holds no records"),
        (["GOOD", "--model", "nowhere/at/all"], 1, "no model at 'nowhere/at/all'"),
        (["GOOD"], 2, "--model is missing"),
        (["GOOD", "--model", "BASE", "--columns", "a"], 2, "--columns: 'a' is no pair"),
        (["GOOD", "--model", "BASE", "--max-length", "0"], 2, "--max-length must be above 0"),
        (["GOOD", "--model", "BASE", "--epochs", "2"], 2, "--epochs"),
        ([], 2, "DATA"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_data_refuses(
    words: list[str], code: int, said: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    places = {"BASE": base, "EMPTY": tmp_path / "empty.jsonl", "GOOD": saved_records(tmp_path / "good.jsonl")}
    assert main(["data", *(str(places.get(word, word)) for word in words)]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and said in captured.err and captured.err.startswith("error: ")
