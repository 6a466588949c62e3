"""The law that every refusal is raised by some test: what it counts, and that it can fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import refusals

ROOT = Path(__file__).parents[2]
ERRORS = """
class VeneerError(Exception): ...
class ConfigError(VeneerError, ValueError): ...
class FormError(ConfigError):
    def __init__(self, what):
        super().__init__(f"no {what}")
"""
SOURCE = """
from veneer import errors
from veneer.errors import ConfigError, FormError, VeneerError

def check(x):
    if x == 1:
        raise ConfigError(
            "one"
            " more"
        )
    if x == 2:
        raise FormError("two")
    if x == 3:
        raise explain(x)
    if x == 4:
        raise errors.ConfigError("four")
    if x == 5:
        raise ValueError("no refusal of ours")
    try:
        parse(x)
    except VeneerError as error:
        raise type(error)("six") from error

def parse(x):
    raise VeneerError(f"{x}")

def explain(x):
    if x == 3:
        return VeneerError("three")
    return ConfigError("neither")
"""
TESTS = """
import subprocess, sys, os, signal
import pytest
from veneer.errors import VeneerError

@pytest.mark.parametrize("x", [1, 3])
def test_here(x):
    import veneer.checking
    with pytest.raises(VeneerError):
        veneer.checking.check(x)

def test_in_a_process_that_is_killed():
    code = '''
import os, signal, veneer.checking
try:
    veneer.checking.check(2)
except ValueError:
    os.kill(os.getpid(), signal.SIGKILL)
'''
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL

def test_a_test_that_makes_one_itself():
    with pytest.raises(VeneerError):
        raise VeneerError("here")
"""
MORE = """
import pytest, veneer.checking

def test_the_rest():
    with pytest.raises(ValueError):
        veneer.checking.check(4)
    with pytest.raises(ValueError):
        veneer.checking.check(5)
    with pytest.raises(veneer.errors.VeneerError):
        veneer.checking.check(6)
    veneer.checking.explain(0)
"""
CONFTEST = """
from pathlib import Path
from tests.refusals import register

def pytest_configure(config):
    register(config, Path(__file__).parents[1] / "src")
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A small project, some refusals of which no test raises."""
    files = {
        "src/veneer/__init__.py": "",
        "src/veneer/errors.py": ERRORS,
        "src/veneer/checking.py": SOURCE,
        "checks/conftest.py": CONFTEST,
        "checks/test_checking.py": TESTS,
        "pytest.ini": f"[pytest]\ntestpaths = checks\npythonpath = src {ROOT}\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def run(project: Path, *arguments: str) -> tuple[int, list[str]]:
    """The exit status of the project's tests, and what they list."""
    code = (
        "import os, sys; os.environ['PYTHONPATH'] = sys.argv.pop(1); import pytest; sys.exit(pytest.main())"
    )
    command = [sys.executable, "-c", code, f"{project / 'src'}", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    listed = [line for line in done.stdout.splitlines() if line.startswith("never raised: ")]
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.returncode, [line.removeprefix("never raised: src/veneer/checking.py:") for line in listed]


NEVER = [
    '16 check: raise errors.ConfigError("four")',
    '22 check: raise type(error)("six") from error',
    '25 parse: raise VeneerError(f"{x}")',
    '30 explain: return ConfigError("neither")',
]


def test_what_no_test_raises_fails_the_run_and_is_listed(project: Path) -> None:
    assert run(project) == (1, NEVER)


def test_workers_and_their_processes_are_watched(project: Path) -> None:
    assert run(project, "-n", "2") == (1, NEVER)


def test_a_run_that_raises_all_of_them_passes(project: Path) -> None:
    (project / "checks" / "test_more.py").write_text(MORE)
    assert run(project) == (0, [])


@pytest.mark.parametrize("part", ["-k=here", "checks/test_checking.py"])
def test_a_run_of_some_tests_is_not_judged(project: Path, part: str) -> None:
    assert run(project, part) == (0, [])


def test_a_run_with_a_failed_test_is_not_judged(project: Path) -> None:
    (project / "checks" / "test_more.py").write_text("def test_false():\n    assert False\n")
    assert run(project) == (1, [])


def test_this_session_is_watched(tmp_path: Path) -> None:
    found = refusals.refusals(ROOT / "src")
    assert len(found) > 300
    assert {one.file for one in found} > {ROOT / "src/veneer/config/base.py", ROOT / "src/veneer_as_peft.py"}
