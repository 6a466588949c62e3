"""accelerate with Veneer's adapters: DDP, FSDP1 and FSDP2 on two gloo processes, by both doors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("accelerate_ranks.py")
#: What the ranks do; each case says how it is compared in `accelerate_ranks.py`.
CASES = [
    "ddp",
    "fsdp1",
    "fsdp1_flat",
    "fsdp2",
    "fsdp2_tied",
    "adapter_only",
    "policy",
    "trainer",
    "veneer_train",
]


@pytest.fixture(scope="module", params=["veneer", "peft"])
def printed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """What the ranks printed: with `from veneer import` beside the real peft, and with Veneer as peft."""
    absent = request.param == "peft"
    python = request.getfixturevalue("nopeft_python") if absent else sys.executable
    place = tmp_path_factory.mktemp("accelerate") / "ranks"
    command = [str(python), str(SCRIPT), str(place), request.param]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    yield done.stdout + done.stderr


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_process(case: str, printed: str) -> None:
    for rank in range(2):
        assert f"ok      {case} {rank}\n" in printed, printed


def test_no_case_is_left_out(printed: str) -> None:
    assert printed.count("ok      ") == 2 * len(CASES), printed
