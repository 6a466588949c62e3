"""FSDP1, FSDP2 and DDP on two ranks: the numbers of one process; what is saved is whole, or refused."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.laws import sharded

CASES = {part: list(cases) for part, cases in sharded.cases(Path()).items()}
MARKS = {"short": (), "rest": pytest.mark.slow}


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """What two ranks print that run the cases of a part; they do so once."""

    @functools.cache
    def printed(part: str) -> list[str]:
        rendezvous = tmp_path_factory.mktemp("gloo") / "store"

        def run(rank: int) -> str:
            done = subprocess.run(
                [sys.executable, "-m", "tests.laws.sharded", str(rank), "2", str(rendezvous), part],
                cwd=Path(ROOT),
                capture_output=True,
                text=True,
                timeout=600,
            )
            return done.stdout + done.stderr

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(run, range(2)))

    return printed


@pytest.mark.parametrize(
    ("part", "case"),
    [pytest.param(part, case, id=case, marks=MARKS[part]) for part in CASES for case in CASES[part]],
)
def test_sharded_equals_one_process(part: str, case: str, printed: Callable[[str], list[str]]) -> None:
    for output in printed(part):
        assert f"ok      {case}\n" in output, output


@pytest.mark.parametrize("part", [pytest.param(part, marks=MARKS[part]) for part in CASES])
def test_no_case_is_left_out(part: str, printed: Callable[[str], list[str]]) -> None:
    for output in printed(part):
        assert output.count("ok      ") == len(CASES[part]), output
