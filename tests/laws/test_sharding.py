"""FSDP1, FSDP2 and DDP on two ranks: the numbers of one process; what is saved is whole, or refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.laws import sharded

CASES = list(sharded.cases(Path()))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """What two ranks printed; they run all cases once."""
    rendezvous = tmp_path_factory.mktemp("gloo") / "store"
    command = [sys.executable, "-m", "tests.laws.sharded"]

    def run(rank: int) -> str:
        done = subprocess.run(
            [*command, str(rank), "2", str(rendezvous)],
            cwd=Path(ROOT),
            capture_output=True,
            text=True,
            timeout=600,
        )
        return done.stdout + done.stderr

    with ThreadPoolExecutor(2) as pool:
        yield list(pool.map(run, range(2)))


@pytest.mark.parametrize("case", CASES)
def test_sharded_equals_one_process(case: str, ranks: list[str]) -> None:
    for output in ranks:
        assert f"ok      {case}\n" in output, output


def test_no_case_is_left_out(ranks: list[str]) -> None:
    for output in ranks:
        assert output.count("ok      ") == len(CASES), output
