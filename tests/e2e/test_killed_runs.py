"""Runs that were killed, wherever that was: going on gives the run that nobody killed, step for step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_killed_anywhere_it_goes_on_to_the_same_run(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "tests.e2e.killed_runs", str(tmp_path), "7"]
    finished = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    places = [place for place in tmp_path.iterdir() if place.name.isdigit()]
    assert len(places) >= int(finished.stdout.splitlines()[-1]) // 7 > 9
    whole = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert whole["steps"] == len(whole["losses"]) == 6
    for place in places:
        metrics = json.loads((place / "metrics.json").read_text())
        for part in ("steps", "losses", "evaluations", "tokens"):
            assert metrics[part] == whole[part], (place.name, part)
        ours, theirs = (p / "adapter_model.safetensors" for p in (place, tmp_path / "whole"))
        assert ours.read_bytes() == theirs.read_bytes(), place.name
