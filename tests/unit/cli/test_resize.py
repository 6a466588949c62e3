"""`veneer resize`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from veneer.cli import main


def test_resize(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resize", str(adapter), "--rank", "2", "--output", str(tmp_path / "two")]) == 0
    out = capsys.readouterr().out
    assert "down_proj" in out and "14 modules, rank 2: " in out and f"{tmp_path / 'two'}" in out
    assert (tmp_path / "two" / "tokenizer_config.json").is_file()
    words = ["resize", str(adapter), "--energy", "0.5", "--output", str(tmp_path / "half"), "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["output"] == str(tmp_path / "half") and len(found["modules"]) == 14
    assert {m["before"] for m in found["modules"].values()} == {4}
    assert 0 < found["error"] <= max(m["error"] for m in found["modules"].values()) <= 0.5**0.5
    assert main(["inspect", str(tmp_path / "half"), "--no-spectrum"]) == 0


def test_every_module_and_a_note(dora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resize", str(dora), "--rank", "1", "--modules", "--output", str(tmp_path / "one")]) == 0
    out = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj" in out and "note: the magnitudes of DoRA stay" in out


@pytest.fixture
def dora(tmp_path: Path) -> Path:
    from tests.unit.integrations.export.adapters import save

    return save("dora", tmp_path).place
