"""The demo's stages on a tiny model, and the bars that it must reach."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.training.tiny import saved_tiny
from veneer.training import demo
from veneer.training.demo import Score, bars, record_of

GOOD = [f'{{"a": {n}}}' for n in range(10)]
BEFORE = Score(0, 0, 1.0, ["no"] * 10)
AFTER = Score(6, 9, 0.4, GOOD)


def test_the_prompt_names_every_key() -> None:
    mail = demo.mails()["train"][0]
    record = record_of(mail)
    assert json.loads(record["completion"]) == mail["answer"]
    assert all(key in demo.INSTRUCTION for key in mail["answer"])
    assert record["prompt"].endswith(mail["header"])


def test_all_bars_reached() -> None:
    assert [bar.passed for bar in bars(BEFORE, AFTER, AFTER, AFTER, AFTER)] == [True] * 5


@pytest.mark.parametrize(
    ("place", "after", "reloaded", "merged"),
    [
        (0, replace(AFTER, valid=8), AFTER, AFTER),
        (1, replace(AFTER, exact=4), AFTER, AFTER),
        (2, replace(AFTER, loss=0.51), replace(AFTER, loss=0.51), AFTER),
        (3, AFTER, replace(AFTER, answers=["{}", *GOOD[1:]]), AFTER),
        (3, AFTER, replace(AFTER, loss=0.41), AFTER),
        (4, AFTER, AFTER, replace(AFTER, answers=["{}", *GOOD[1:]])),
        (4, AFTER, AFTER, replace(AFTER, loss=0.401)),
    ],
)
def test_each_bar_fails_alone(place: int, after: Score, reloaded: Score, merged: Score) -> None:
    passed = [bar.passed for bar in bars(BEFORE, after, reloaded, AFTER, merged)]
    assert passed == [number != place for number in range(5)]


def test_the_whole_course_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_tiny(tmp_path / "base")
    parts = {name: part[:4] for name, part in demo.mails().items()}
    monkeypatch.setattr(demo, "demo_model", lambda progress: tmp_path / "base")
    monkeypatch.setattr(demo, "mails", lambda: parts)
    monkeypatch.setattr(demo, "MAX_NEW_TOKENS", 5)
    monkeypatch.setattr(demo, "OPTIONS", replace(demo.OPTIONS, max_steps=2, batch_size=2))
    result = demo.run_demo(tmp_path / "out")
    assert not result.passed
    by_name = {bar.what: bar.passed for bar in result.bars}
    assert by_name["reloaded adapter"] and by_name["merged model"]
    assert by_name["valid JSON"] is by_name["exact answers"] is False
    assert result.after.loss < result.before.loss
    assert result.sizes["adapter"] > 0 and result.kept_in_16_bits > 0.99  # the tiny base has 32 bits
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["passed"] is False and len(metrics["losses"]) == 2
    assert all(Path(place).exists() for place in result.places.values())
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
