"""`veneer ls`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from veneer.cli import main


def test_ls(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "no adapter in" in captured.err
    shutil.copytree(adapter, tmp_path / "good")
    shutil.copytree(adapter, tmp_path / "bad")
    assert main(["ls", str(tmp_path), "--check"]) == 0
    out = capsys.readouterr().out
    assert (
        "good" in out
        and " ok" not in out
        and "broken" not in out
        and "2 adapters, " in out
        and "down_proj" in out
    )
    (tmp_path / "bad" / "adapter_model.safetensors").write_bytes(b"\0" * 64)
    assert main(["ls", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "bad: adapter_model.safetensors" in out and "1 of them broken" in out
    assert main(["ls", str(tmp_path), "--check", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [entry["path"] for entry in found] == ["bad", "good"] and found[1]["ranks"] == [4]
    assert main(["ls", str(tmp_path / "nowhere")]) == 1
    assert "does not exist" in capsys.readouterr().err
