"""Files go both ways with older versions of PEFT: the tests of files, run with each of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.interop.older import ROOT, WITHOUT_TORCHAO, variables
from tests.processes import run_python

VERSIONS = ("0.18.1", "0.19.1", "0.20.0")

PROGRAM = f"""{WITHOUT_TORCHAO}
from importlib.metadata import version

import pytest

assert version("peft") == sys.argv[1], version("peft")
files = ["tests/interop/test_reference_files.py", "tests/interop/test_reference_expert_files.py"]
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "", *files]))
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_files_both_ways(version: str, tmp_path: Path) -> None:
    env = {**variables(f"peft-{version}"), "TMPDIR": str(tmp_path)}
    done = run_python(PROGRAM, version, env=env, cwd=ROOT, timeout=900)
    passed = re.search(r"(\d+) passed in", done.stdout)
    assert passed and int(passed[1]) > 100, done.stdout
