"""`veneer demo`: what it shows, and when it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from veneer.cli import main
from veneer.training import demo, read_records


def result(passed: bool) -> Any:
    score = demo.Score(40, 48, 0.05, ["{}"] * 48)
    return demo.DemoResult(
        mails=demo.mails()["heldout"],
        before=demo.Score(0, 0, 0.6, ["before"] * 48),
        after=score,
        reloaded=score,
        unmerged=score,
        merged=score,
        kept_in_16_bits=0.45,
        trainable=100,
        parameters=10_000,
        sizes={"adapter": 20_000_000, "base": 269_000_000, "merged": 538_000_000},
        places={"adapter": "somewhere/adapter"},
        seconds={"training": 60.0},
        bars=[demo.Bar("valid JSON", "at least 90 %", "48/48", passed)],
    )


@pytest.mark.parametrize("passed", [True, False])
def test_demo_exits_1_unless_every_bar_is_reached(
    passed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def fake(output: Path, seed: int, progress: Any) -> Any:
        asked.append((output, seed))
        return result(passed)

    monkeypatch.setattr(demo, "run_demo", fake)
    assert main(["demo", "--output", str(tmp_path), "--seed", "3"]) == (0 if passed else 1)
    assert asked == [(tmp_path, 3)]
    out = capsys.readouterr().out
    rows = ("exact match", "valid JSON", "held-out loss")
    for words in ("before", "after", "reloaded", *rows, "20 MB", "269 MB", "538 MB", "45.0%"):
        assert words in out
    assert ("Every bar was reached" in out) is passed
    assert ("NOT REACHED: valid JSON" in out) is not passed


def test_demo_writes_what_it_works_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "cache" / "SmolLM2"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    monkeypatch.setattr(demo, "demo_model", lambda progress: model)
    assert main(["demo", "--export", str(tmp_path / "mails")]) == 0
    assert str(tmp_path / "mails" / "train.jsonl") in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "mails").iterdir()}
    assert names == {"SmolLM2", "train.jsonl", "heldout.jsonl"}
    assert (tmp_path / "mails" / "SmolLM2" / "config.json").read_text() == "{}"
    records = read_records(tmp_path / "mails" / "heldout.jsonl")
    assert len(records) == 48 and {"prompt", "completion"} <= set(records[0])
    assert main(["demo", "--export", str(tmp_path / "mails")]) == 1
    assert "not empty" in capsys.readouterr().err
