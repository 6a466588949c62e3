"""A short form of `make fuzz`: broken input is used or refused, nothing is written, no model is changed."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from functools import partial
from inspect import isclass, isroutine, signature
from pathlib import Path
from types import ModuleType

import pytest
import typer

from tests.fuzz import cases
from tests.fuzz.cases import Case, drawn, tried
from tests.fuzz.doors import DOORS, NO_DOORS, WITH_BASE, Door, Inputs
from tests.fuzz.materials import make
from tests.kills import done
from tests.unit.training.tiny import tiny_model
from veneer import ConfigError
from veneer.cli import main
from veneer.cli.common import app

SOURCES = Path(__file__).parents[2] / "src"
QUICK = {name: door for name, door in DOORS.items() if door.weight > WITH_BASE}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("good")
    done(partial(make, place))
    tiny_model()  # imports what every case needs
    assert main(["ls", str(place)]) == 0
    return place


def test_broken_input_is_used_or_refused(good: Path, tmp_path: Path) -> None:
    found = {number: tried(drawn(18, number, QUICK), good, tmp_path / str(number)) for number in range(40)}
    assert {number: outcome for number, outcome in found.items() if outcome.word == "failed"} == {}
    assert {outcome.word for outcome in found.values()} == {"done", "refused"}


def test_every_command_and_every_public_function_that_takes_a_path_is_a_door_or_says_why_not() -> None:
    doors = {name.partition(",")[0] for name in DOORS}
    commands = {f"veneer {name}" for name in typer.main.get_command(app).commands}  # type: ignore[attr-defined]
    entered = {" ".join(name.split()[:2]) for name in doors}
    assert commands - entered == set()
    faces = [
        importlib.import_module(".".join(file.relative_to(SOURCES).with_suffix("").parts))
        for file in SOURCES.glob("veneer/**/public.py")
    ]
    functions = {name for face in faces for name in _taking_paths(face)}
    assert functions >= {"PeftModel.from_pretrained", "convert_adapter", "train"}
    assert functions - doors - set(NO_DOORS) == set()
    assert set(NO_DOORS) <= functions - doors


def _taking_paths(face: ModuleType) -> Iterator[str]:
    """The names, as they are defined, of public functions and methods with a parameter that is a path."""
    for public in (getattr(face, name) for name in face.__all__):
        inside = [getattr(public, name) for name in dir(public) if name[0] != "_"] if isclass(public) else []
        for function in filter(isroutine, [public, *inside]):
            with contextlib.suppress(ValueError):  # of builtins
                if "Path" in str([p.annotation for p in signature(function).parameters.values()]):
                    yield function.__qualname__


def write(inputs: Inputs) -> None:
    """A door that writes where it refuses."""
    Path("left").touch()
    raise ConfigError("no")


def fill(inputs: Inputs) -> None:
    bytearray(3 * 2**30)


def wait(inputs: Inputs) -> None:
    os.read(os.pipe()[0], 1)


def compute(inputs: Inputs) -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("enter", "says"),
    [
        (lambda inputs: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda inputs: (_ for _ in ()).throw(ConfigError("x" * 10**6)), "a message of 1,000,000 characters"),
        (write, "refused, and changed left"),
        (fill, "MemoryError: "),
        (wait, "it waits for ever"),
        (compute, "more than 1 s"),
        (lambda inputs: os._exit(3), "the process ended with 3"),
        (
            lambda inputs: os.write(2, b"Traceback (most recent") and 1,
            "exit code 1: Traceback",
        ),
    ],
    ids="error message written memory waiting computing exit traceback".split(),
)
def test_what_is_wrong_is_noticed(
    enter: object, says: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cases, "PATIENCE", 2)
    if enter is compute:
        monkeypatch.setattr(cases, "SECONDS", 1)
        monkeypatch.setattr(cases, "PATIENCE", 40)
    monkeypatch.setitem(DOORS, "bad", Door(enter, ("adapter",)))  # type: ignore[arg-type]
    outcome = tried(Case(0, 0, "configuration", "adapter", "bad"), good, tmp_path / "case")
    assert outcome.word == "failed" and says in outcome.detail
