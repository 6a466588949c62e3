"""`veneer verify`."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from veneer.cli import main


def test_verify(adapter: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(adapter)]) == 0
    out = capsys.readouterr().out
    assert [line.split()[:2] for line in out.splitlines()] == [
        ["ok", f"{n}:"] for n in ("files", "digest", "values")
    ]
    assert main(["verify", str(adapter), "--model", str(base), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] and len(found["checks"]) == 8
    assert {check["passed"] for check in found["checks"]} == {True}


def test_a_check_that_fails_is_exit_1(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = shutil.copytree(adapter, tmp_path / "cut")
    os.truncate(place / "adapter_model.safetensors", 900)
    assert main(["verify", str(place)]) == 1
    assert capsys.readouterr().out.startswith("FAILED  files: ")
    assert main(["verify", str(place), "--json"]) == 1
    assert not json.loads(capsys.readouterr().out)["passed"]
