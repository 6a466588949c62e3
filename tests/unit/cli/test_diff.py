"""`veneer diff`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.integrations.export.adapters import save
from veneer.cli import main


def test_an_adapter_and_itself(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", str(adapter), str(adapter)]) == 0
    out = capsys.readouterr().out
    assert "28 | 28, of which 28 are the same" in out and "change every weight in the same way" in out


def test_two_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = save("norms", tmp_path / "one").place
    two = save("dora", tmp_path / "two", r=2, target_modules=["q_proj", "up_proj"]).place
    assert main(["diff", str(one), str(two), "--modules"]) == 0
    out = capsys.readouterr().out
    assert "r: 4 | 2\n" in out and "only in A: 2 modules" in out and "only in B: 2 modules" in out
    assert "model.layers.1.self_attn.q_proj" in out and "note: " in out and "most model.layers" in out
    assert "other tensors that are not the same" in out
    assert main(["diff", str(one), str(two), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["options"]["r"] == [4, 2] and not found["same_updates"]
    (first, *_) = found["modules"].values()
    assert len(first["inputs"]["degrees"]) == 2 and 0 < first["distance"] < 2
    other = save("gpt2", tmp_path / "three").place
    assert main(["diff", str(one), str(other)]) == 0
    assert "no module that both adapt" in capsys.readouterr().out
