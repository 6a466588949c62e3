"""What make sets up: the program that does it, and the environment without the reference library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.processes import run_python
from tests.programs import load_program

ROOT = Path(__file__).parents[2]


@pytest.fixture
def setup_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """tools/setup.py as a module, with a virtual environment of its own that no test makes."""
    module = load_program(monkeypatch, "setup_program", "tools/setup.py")
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "PYTHON", Path(sys.executable))
    monkeypatch.setattr(module, "STAMPS", tmp_path / ".venv" / "stamps")
    monkeypatch.setattr(module, "MODELS", tmp_path / "models")
    monkeypatch.setattr(module, "make_venv", lambda: None)
    monkeypatch.setattr(module, "install_models", lambda: None)
    monkeypatch.setattr(module, "install_torch", lambda gpu: None)
    return module


def test_each_step_runs_once_and_what_changed_runs_again(
    setup_program: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(setup_program, "pip", lambda *arguments: calls.append(arguments))
    setup_program.run("base")
    said = capsys.readouterr().out
    assert said.index("about 271 MB") < said.index("== torch")
    assert len(calls) == 2
    setup_program.run("base")
    assert len(calls) == 2
    assert capsys.readouterr().out == ""
    setup_program.run("test")
    assert [call[-1] for call in calls[2:]] == [str(ROOT / "requirements" / "test.txt")]
    (setup_program.STAMPS / "base").write_text("made for other requirements")
    setup_program.run("test")
    assert [call[-1] for call in calls[3:]] == [str(ROOT / "requirements" / "base.txt")]


def test_an_interrupted_set_up_goes_on_where_it_was(
    setup_program: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def fails_at_first(*arguments: str) -> None:
        done.append(arguments[-1])
        if len(done) == 2:
            raise setup_program.SetupError("the network broke off")

    monkeypatch.setattr(setup_program, "pip", fails_at_first)
    with pytest.raises(setup_program.SetupError):
        setup_program.run("base")
    setup_program.run("base")
    assert done == [str(ROOT / "requirements" / "base.txt"), str(ROOT), str(ROOT)]


def test_failures_are_explained(setup_program: ModuleType) -> None:
    words = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
    assert "disk is full" in setup_program.advice_on(words)
    assert "No network" in setup_program.advice_on("NewConnectionError: Failed to establish a new connection")
    assert setup_program.advice_on("something else", "look") == "look"


def test_an_old_python_is_refused_with_the_way_out(
    setup_program: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup_program, "OLDEST", (99, 0))
    with pytest.raises(setup_program.SetupError, match=r"needs 99\.0 or newer.*make PYTHON="):
        setup_program.run("base")


def test_the_reference_is_absent_from_its_environment_and_all_else_is_there(nopeft_python: Path) -> None:
    done = run_python(
        "import importlib.metadata as m, importlib.util as u\n"
        "assert u.find_spec('peft') is None\n"
        "assert not [d for d in m.distributions() if d.name == 'peft']\n"
        "try:\n    import peft\nexcept ModuleNotFoundError:\n    print('absent')\n"
        "import torch, transformers, veneer\n"
        "from transformers.utils import is_peft_available\n"
        "print(is_peft_available(), torch.ones(2).sum().item())",
        python=nopeft_python,
    )
    assert done.stdout.split() == ["absent", "False", "2.0"]


def test_the_environment_is_made_anew_when_what_it_mirrors_changes(tmp_path: Path) -> None:
    target = tmp_path / "mirror"
    command = [sys.executable, str(ROOT / "tools" / "make_nopeft_env.py"), str(target)]
    python = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    made = target.stat().st_ino
    assert Path(python).is_relative_to(target)
    subprocess.run(command, capture_output=True, check=True)
    assert target.stat().st_ino == made
    (target / "mirror-of").write_text("another list")
    subprocess.run(command, capture_output=True, check=True)
    assert target.stat().st_ino != made
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mirror"]


def test_a_link_in_its_place_goes_and_what_it_leads_to_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = load_program(monkeypatch, "nopeft_program", "tools/make_nopeft_env.py")
    elsewhere, target = tmp_path / "elsewhere", tmp_path / "mirror"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    target.symlink_to(elsewhere)
    program.make(target)
    assert not target.is_symlink()
    assert [path.name for path in elsewhere.iterdir()] == ["kept"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "mirror"]
