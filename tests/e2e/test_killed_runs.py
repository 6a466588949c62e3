"""Work that was killed, wherever that was: what is on disk is whole, and going on is as if nobody had."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from veneer.files.overwrite import check_replaceable

ROOT = Path(__file__).parents[2]


def count_of(program: str, *arguments: object) -> int:
    """What a program prints last."""
    words = [sys.executable, "-m", f"tests.e2e.{program}", *map(str, arguments)]
    finished = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return int(finished.stdout.splitlines()[-1])


@pytest.mark.slow
def test_killed_anywhere_it_goes_on_to_the_same_run(tmp_path: Path) -> None:
    count = count_of("killed_runs", tmp_path, 7)
    places = [place for place in tmp_path.iterdir() if place.name.isdigit()]
    assert len(places) >= count // 7 > 9
    whole = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert whole["steps"] == len(whole["losses"]) == 6
    for place in places:
        metrics = json.loads((place / "metrics.json").read_text())
        for part in ("steps", "losses", "evaluations", "tokens"):
            assert metrics[part] == whole[part], (place.name, part)
        ours, theirs = (p / "adapter_model.safetensors" for p in (place, tmp_path / "whole"))
        assert ours.read_bytes() == theirs.read_bytes(), place.name


@pytest.mark.slow
def test_killed_anywhere_a_sweep_goes_on_to_the_same_result(tmp_path: Path) -> None:
    count = count_of("killed_sweeps", tmp_path, 13)
    places = [place for place in tmp_path.iterdir() if place.name.isdigit()]
    assert len(places) >= count // 13 > 5
    whole = json.loads((tmp_path / "whole" / "sweep.json").read_text())
    for place in places:
        assert json.loads((place / "sweep.json").read_text()) == whole, place.name
        names = {path.name for path in place.iterdir() if not path.name.startswith(".veneer-")}
        assert names == {path.name for path in (tmp_path / "whole").iterdir()}, place.name
        best = f"{whole['best']}/adapter_model.safetensors"
        assert (place / best).read_bytes() == (tmp_path / "whole" / best).read_bytes(), place.name


def content(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["files", "memory"])
def test_killed_anywhere_a_merge_leaves_one_whole_model(way: str, tmp_path: Path) -> None:
    count = count_of("killed_merges", tmp_path, way)
    old, new = content(tmp_path / "old"), content(tmp_path / "new" / "out")
    shards = {name for name in old if name.endswith(".safetensors")}
    assert len(shards) > 1 and all(old[name] != new.get(name) for name in shards)
    assert old["notes.txt"] == new["notes.txt"] and count > 10
    left = {"old": 0, "new": 0, "none": 0}
    for step in range(1, count + 1):
        out = tmp_path / str(step) / "out"
        if not out.exists():
            (hidden,) = out.parent.iterdir()
            assert [content(hidden / name) for name in ("old", "new")] == [old, new]
            left["none"] += 1
        else:
            left["old" if content(out) == old else "new"] += 1
        check_replaceable(out, overwrite=True)
        assert list(out.parent.iterdir()) == [out] and content(out) in (old, new), step
    assert left["old"] > 9 and left["none"] == 1 and left["new"] >= 1, left
