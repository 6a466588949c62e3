"""A short form of `make kills`: merges, a run and its checkpoints, killed on their way."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.kills import tried


@pytest.mark.parametrize(("work", "kills"), [("merge --low-memory", 3), ("train", 1)])
def test_what_a_kill_leaves_is_old_or_new_or_goes_on(work: str, kills: int, tmp_path: Path) -> None:
    found = tried(work, kills, 0, tmp_path / "tries")
    assert found["at a step"] >= 1
    words = ("old", "new", "both set aside", "resumed", "begun again")
    assert sum(found[word] for word in words) == kills
