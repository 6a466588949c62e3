"""The demo's stages on a tiny model, the claims that it makes, and what it hands out."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.programs import ROOT, load_program
from tests.unit.training.tiny import saved_tiny
from veneer.training import read_records


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """examples/demo.py, with a tiny model."""
    for name in ("data", "side_by_side"):
        load_program(monkeypatch, name, f"examples/{name}.py")
    program = load_program(monkeypatch, "demo", "examples/demo.py")
    saved_tiny(tmp_path / "base")
    monkeypatch.setattr(program.data, "SMOLLM2", tmp_path / "base")
    return program


def run(demo: ModuleType, monkeypatch: pytest.MonkeyPatch, *flags: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["examples/demo.py", *map(str, flags)])
    return int(demo.main())


def test_the_prompt_names_every_key(demo: ModuleType) -> None:
    mail = demo.data.headers()["train"][0]
    record = demo.data.record_of(mail)
    assert json.loads(record["completion"]) == mail["answer"]
    assert all(key in demo.data.INSTRUCTION for key in mail["answer"])
    assert record["prompt"].endswith(mail["header"])


@pytest.mark.parametrize(
    ("place", "changed"),
    [
        (None, {}),
        (0, {"after": {"valid": 8}, "reloaded": {"valid": 8}}),
        (1, {"after": {"exact": 4}}),
        (2, {"after": {"loss": 0.51}, "reloaded": {"loss": 0.51}}),
        (3, {"reloaded": {"answers": ["{}"] * 10}}),
        (3, {"reloaded": {"loss": 0.41}}),
        (4, {"merged": {"answers": ["{}"] * 10}}),
        (4, {"merged": {"loss": 0.401}}),
    ],
)
def test_each_claim_fails_alone(demo: ModuleType, place: int | None, changed: dict[str, Any]) -> None:
    good = demo.Score(6, 9, 0.4, [f'{{"a": {n}}}' for n in range(10)])
    scores = {name: good for name in ("after", "reloaded", "unmerged", "merged")}
    scores |= {name: replace(good, **what) for name, what in changed.items()}
    claims: list[bool] = []
    study = SimpleNamespace(short=False, claim=lambda what, holds: claims.append(holds))
    demo.claim(study, demo.Score(0, 0, 1.0, ["no"] * 10), **scores)
    assert claims == [number != place for number in range(5)]


def test_the_whole_course_on_a_tiny_model(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {name: part[:4] for name, part in demo.data.headers().items()}
    monkeypatch.setattr(demo.data, "headers", lambda: parts)
    monkeypatch.setattr(demo, "MAX_NEW_TOKENS", 5)
    monkeypatch.setattr(demo, "OPTIONS", replace(demo.OPTIONS, max_steps=2, batch_size=2))
    assert run(demo, monkeypatch, "--out", tmp_path / "out") == 1
    found = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert list(found["claims"].values()) == [False, False, False, True, True]
    assert found["extra"]["scores"]["after"]["loss"] < found["extra"]["scores"]["before"]["loss"]
    assert 0 < found["extra"]["kept in 16 bits"] < 0.99  # bfloat16 rounds much of so small an update away
    assert len(found["extra"]["losses"]) == 2 and found["extra"]["megabytes"]["adapter"] > 0
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(
        words in printed for words in ("before", "after (wrong)", "reloaded", "exact answers", "FAILS")
    )


def test_model_and_mails_are_handed_out(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flags = ("--out", tmp_path / "out", "--export", tmp_path / "mails")
    assert run(demo, monkeypatch, *flags) == 0
    assert {path.name for path in (tmp_path / "mails").iterdir()} == {"base", "train.jsonl", "heldout.jsonl"}
    assert (tmp_path / "mails" / "base" / "config.json").is_file()
    records = read_records(tmp_path / "mails" / "heldout.jsonl")
    assert len(records) == 48 and {"prompt", "completion"} <= set(records[0])
    with pytest.raises(SystemExit, match="not empty"):
        run(demo, monkeypatch, *flags)


def test_a_model_that_is_not_there(demo: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo.data, "SMOLLM2", tmp_path / "nowhere")
    with pytest.raises(SystemExit, match="Fetch it: python tools/smollm2"):
        run(demo, monkeypatch, "--out", tmp_path / "out")
    assert (ROOT / "tools" / "smollm2.py").is_file()
