"""The mutants of tools/mutants.py fit the sources and name tests that are there; a survivor is reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.programs import program

ROOT = Path(__file__).parents[2]
mutants = program("tools/mutants.py")


def test_every_mutant_fits_the_sources() -> None:
    assert len({mutant.name for mutant in mutants.MUTANTS}) == len(mutants.MUTANTS) >= 30
    for mutant in mutants.MUTANTS:
        changed = mutants.edited(mutant, ROOT / "src/veneer")
        compile(changed, mutant.file, "exec")
        for test in mutant.tests:
            assert not test.startswith("tests/") or (ROOT / test).exists(), (mutant.name, test)


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ("#: How many may be open.\nMOST = 99\n", "SURVIVED"),
        ("#: How many may be open.\nMOST = 3\n", "test_probe.py::test_most"),
        ("MOST = (\n", "pytest ended with"),
    ],
)
def test_a_survivor_is_told_from_a_mutant_that_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str, words: str
) -> None:
    (tmp_path / "src/veneer").mkdir(parents=True)
    (tmp_path / "src/veneer/__init__.py").write_text("")
    (tmp_path / "src/veneer/probe.py").write_text("MOST = 5\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_probe.py").write_text(
        "from veneer import probe\n\ndef test_most():\n    assert probe.MOST >= 4\n"
    )
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    mutant = mutants.Mutant("most", "a bound", "probe.py", "MOST = 5\n", after, ("tests/test_probe.py",))
    outcome = mutants.tried(mutant)
    assert words in outcome.words
    assert outcome.caught is (words == "test_probe.py::test_most")


def test_an_edit_that_no_longer_fits_is_no_success(tmp_path: Path) -> None:
    outcome = mutants.tried(mutants.MUTANTS[0]._replace(before="no such text"))
    assert not outcome.caught and "stands 0 times" in outcome.words
