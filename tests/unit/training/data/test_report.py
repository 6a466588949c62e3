"""What a run would train on: what is shown, counted, cut and found twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.training.tiny import RECORDS, saved_records, tiny_tokenizer
from veneer.training import encode, read_records
from veneer.training.data import IGNORED
from veneer.training.data.forms import Purpose
from veneer.training.data.report import LONGEST, DataReport, histogram, report, written

TOKENIZER = tiny_tokenizer()


def reported(
    place: Path, rows: list[dict[str, Any]], purpose: Purpose = "sft", length: int = 64
) -> DataReport:
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    method = purpose if purpose in ("dpo", "kto") else "sft"
    return report(read_records(place, purpose), TOKENIZER, length, method)


def test_the_examples_are_those_of_training(tmp_path: Path) -> None:
    records = read_records(saved_records(tmp_path / "data.jsonl"))
    found = report(records, TOKENIZER, 64, shown=16)
    assert found.encoded == encode(records, TOKENIZER, 64)
    for row, pieces in zip(encode(records, TOKENIZER, 64).rows, found.shown, strict=True):
        assert "".join(text for text, _ in pieces) == TOKENIZER.decode(row["input_ids"])
        counted = [label for label in row["labels"] if label != IGNORED]
        assert "".join(text for text, counts in pieces if counts) == TOKENIZER.decode(counted)
    assert found.shown[0] == [("<|user|>Double 10.<|end|>\n<|assistant|>", False), ("20<|end|>", True)]


def test_the_first_token_of_a_text_does_not_count(tmp_path: Path) -> None:
    assert reported(tmp_path / "data.jsonl", [{"text": "Once"}]).shown == [
        [("O", False), ("nce<|end|>", True)]
    ]


def test_classes_and_preferences(tmp_path: Path) -> None:
    classes = [{"text": "a", "label": "bad"}, {"text": "b", "label": "good"}]
    found = reported(tmp_path / "classes.jsonl", classes, "classification")
    assert found.shown == [[("a", False), (" → bad", True)], [("b", False), (" → good", True)]]
    assert "counted_tokens" not in found.as_json()
    pairs = [{"prompt": "Two?", "chosen": "2", "rejected": "3"}]
    (pieces,) = reported(tmp_path / "pairs.jsonl", pairs, "dpo").shown
    assert pieces == [
        ("<|user|>Two?<|end|>\n<|assistant|>", False),
        ("\nchosen: ", False),
        ("2<|end|>\n", True),
        ("\nrejected: ", False),
        ("3<|end|>\n", True),
    ]
    plain = report(read_records(tmp_path / "pairs.jsonl", "dpo"), tiny_tokenizer(template=None), 64, "dpo")
    judged = [{"prompt": "Two?", "completion": n, "label": n == 2} for n in (2, 3)]
    found = reported(tmp_path / "judged.jsonl", judged, "kto")
    assert [[pieces[1][0], pieces[2][0]] for pieces in found.shown] == [
        ["\ngood: ", "2<|end|>\n"],
        ["\nbad: ", "3<|end|>\n"],
    ]
    assert plain.shown[0][0] == ("Two?", False) and plain.shown[0][2] == ("2", True)


def test_what_is_cut_and_what_is_there_twice(tmp_path: Path) -> None:
    long = {"prompt": "a", "completion": "b" * 40}
    rows = [RECORDS[0], long, {**RECORDS[0], "id": 3}, RECORDS[1], long, RECORDS[0]]
    found = reported(tmp_path / "data.jsonl", rows, length=20)
    assert found.cut == ["line 2", "line 5"] and found.encoded.cut == 2
    assert found.duplicates == [["line 1", "line 3", "line 6"], ["line 2", "line 5"]]
    lines = found.lines()
    assert lines[0] == "Tokens of an example: 17 at least, 17 in the median, 46 at most"
    assert lines[-2] == "Longer than 20 tokens, and cut there: line 2, line 5"
    assert lines[-1] == "3 duplicates: line 1 = line 3 = line 6, line 2 = line 5"
    assert found.as_json()["lengths"] == {"least": 17, "median": 17, "most": 46}
    clean = reported(tmp_path / "data.jsonl", RECORDS)
    assert clean.lines()[-2:] == ["Nothing is cut at 64 tokens", "No duplicates"]
    assert clean.as_json()["tokens"] == 272 and clean.as_json()["counted_tokens"] == 48


def test_the_histogram() -> None:
    heading, *lines = histogram([17] * 4)
    assert heading.split() == ["tokens", "examples"]
    assert lines == [f"  {'17':>16}  {'4':>8}  {'█' * 40}"]
    _, *lines = histogram([*range(0, 20), 55])
    assert [line.split()[:4] for line in lines[:2]] == [["0", "to", "4", "5"], ["5", "to", "9", "5"]]
    assert len(lines) == 12 and lines[-1].endswith("1  ████████") and lines[-2].rstrip().endswith("0")
    assert sum(int(line.split("  ")[-2 if "█" in line else -1]) for line in lines) == 21


@pytest.mark.parametrize("in_colour", [True, False])
def test_what_counts_is_seen_with_and_without_colours(in_colour: bool) -> None:
    text = written([("a\x1b[1m\n", False), ("b", True)], in_colour)
    assert text.plain == "a\\x1b[1m\n" + ("b" if in_colour else "[[b]]")
    assert [str(span.style) for span in text.spans] == (["dim", "green"] if in_colour else [])
    long = written([("x" * (LONGEST + 1234), False)], in_colour).plain
    assert "1,234 characters" in long and len(long) < LONGEST + 40
