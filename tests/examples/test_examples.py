"""Every example runs in its short form, and its claims hold; a false claim is found out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

FOLDER = ROOT / "examples"
#: A file of examples/ is an example if it can be run; the others are what examples share.
EXAMPLES = [p for p in sorted(FOLDER.glob("*.py")) if '__name__ == "__main__"' in p.read_text("utf-8")]


def run_example(path: Path, *flags: str | Path) -> subprocess.CompletedProcess[str]:
    """The program `path` as a user starts it, in the directory of its results."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(FOLDER)])}
    # Tests compute with one thread each, as there are as many workers as cores.
    return subprocess.run(
        [sys.executable, str(path), *map(str, flags)], env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_short_form_runs_and_its_claims_hold(
    path: Path, tmp_path: Path, models: Path, smollm2: Path
) -> None:
    done = run_example(path, "--short", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / f"{path.stem}.json").read_text("utf-8"))
    assert found["passed"] and found["short"] and found["claims"] and all(found["claims"].values())
    for row in found["rows"]:
        counts = {len(values) for values in row["scores"].values()}
        assert counts == {len(row["seconds"])} and (row["trainable"] > 0) == (row["saved_bytes"] > 0)
    printed = (tmp_path / f"{path.stem}.txt").read_text("utf-8")
    assert printed in done.stdout


SMALL = """
import torch
from side_by_side import Study, run

def build(method):
    return torch.nn.Linear(3, 2).requires_grad_(method != "base")

def train(model, method, seed):
    torch.nn.init.ones_(model.weight)

def score(model):
    return {"mean": model.weight.mean().item()}

def main():
    study = Study("Ones are more than others.")
    study.compare(["base", "full"], build, train, score, once=["base"])
    study.claim("full is at least WANTED", study.lowest("full") >= WANTED > study.highest("base"))
    study.picture(floor=0.5)
    return study.finish()

if __name__ == "__main__":
    run(main)
"""


@pytest.mark.parametrize(("wanted", "code"), [("1", 0), ("2", 1)])
def test_a_claim_that_does_not_hold_fails(wanted: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(SMALL.replace("WANTED", wanted))
    done = run_example(tmp_path / "small.py", "--out", tmp_path / "out")
    assert done.returncode == code, done.stderr
    assert ("FAILS" in done.stdout, "holds" in done.stdout) == (code == 1, code == 0)
    found = json.loads((tmp_path / "out" / "small.json").read_text())
    assert found["passed"] is (code == 0)
    base, full = found["rows"]
    assert (base["trainable"], base["saved_bytes"], len(base["seconds"])) == (0, 0, 1)
    assert (full["trainable"], full["parameters"], full["scores"]["mean"]) == (8, 8, [1.0, 1.0, 1.0])
    assert full["saved_bytes"] > 8 * 4
    assert (tmp_path / "out" / "small.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["small.json", "small.png", "small.txt"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_has_a_page_that_names_it_and_is_listed(path: Path) -> None:
    guides = ROOT / "docs" / "guides"
    assert f"python examples/{path.name}" in (guides / f"{path.stem}.md").read_text("utf-8")
    assert f"({path.stem}.md)" in (guides / "index.md").read_text("utf-8")
