"""Work that was killed, wherever that was: what is on disk is whole, and going on is as if nobody had."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def lines_of(kills: int, *works: str) -> list[str]:
    """What the program says of each work; it fails where a kill left a mixture, or another result."""
    words = [sys.executable, "-m", "tests.e2e.kills", str(kills), "--seed", "1", "--of", *works]
    finished = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.splitlines()[1:]


@pytest.mark.slow
def test_killed_anywhere_it_goes_on_to_the_same_run() -> None:
    (line,) = lines_of(16, "train")
    assert "resumed: " in line


@pytest.mark.slow
def test_killed_anywhere_a_sweep_goes_on_to_the_same_result() -> None:
    (line,) = lines_of(12, "sweep")
    assert "resumed: " in line


@pytest.mark.slow
def test_killed_at_every_step_old_or_new_files_are_left() -> None:
    works = ("export", "import", "resize", "merge --low-memory", "merge")
    lines = lines_of(0, *works)
    assert [line.partition(":")[0] for line in lines] == list(works)
    assert all("old: " in line and "new: " in line and "both set aside: 1" in line for line in lines), lines


@pytest.mark.slow
def test_killed_at_every_step_a_save_leaves_others_old_or_new_tensors() -> None:
    (line,) = lines_of(0, "save")
    assert all(part in line for part in ("old: ", "new: ", "others: the new tensors alone: ")), line
