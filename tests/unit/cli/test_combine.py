"""`veneer combine`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from veneer.cli import main


def test_combine(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = str(shutil.copytree(adapter, tmp_path / "other"))
    words = ["combine", str(adapter), other, "--output"]
    assert main([*words, str(tmp_path / "sum"), "--weights", "0.7,-0.2"]) == 0
    out = capsys.readouterr().out
    assert "cat: 14 modules, rank 8" in out and "at most 0.00%" in out and "down_proj" in out
    assert main([*words, str(tmp_path / "few"), "--energy", "0.9", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["method"] == "svd" and {m["rank"] <= 4 for m in found["modules"].values()} == {True}
    dare = [*words, str(tmp_path / "dare"), "--method", "dare_ties_svd", "--density", "0.5", "--rank", "2"]
    assert main([*dare, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert main([*dare, "--overwrite-output-dir", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == first


def test_weights_are_numbers(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["combine", str(adapter), "--output", "out", "--weights", "a,1"]) == 2
    assert "--weights takes numbers" in capsys.readouterr().err
