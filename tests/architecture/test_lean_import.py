"""Veneer brings in torch and safetensors with its first public name, and nothing else that is not its own."""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path
from typing import Any

import pytest

from tests.processes import run_python

HEAVY = (
    "transformers",
    "accelerate",
    "huggingface_hub",
    "bitsandbytes",
    "matplotlib",
    "typer",
    "rich",
    "peft",
)
PACKAGES = """
import json, sys

def packages(before=()):
    tops = {name.partition(".")[0] for name in set(sys.modules) - set(before)}
    return sorted(top for top in tops if top not in sys.stdlib_module_names)
"""
IMPORTING = f"""{PACKAGES}
import logging, warnings
import torch, safetensors.torch

def settings():
    root = logging.getLogger()
    return (torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype(),
            list(warnings.filters), list(root.handlers), root.level)

found, before, were = {{}}, set(sys.modules), settings()
from veneer import *
found["changed"] = settings() != were
found["added"], found["loaded"] = packages(before), packages()
before = set(sys.modules)
import typer, huggingface_hub
found["added later"] = packages(before)
print(json.dumps(found))
"""
WITHOUT_A_NAME = f"""{PACKAGES}
before = set(sys.modules)
import veneer, veneer.errors
veneer.__version__, veneer.errors
print(json.dumps(packages(before)))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, Any]:
    """What all public names add to torch and safetensors, what is loaded then, and what two libraries add."""
    return json.loads(run_python(IMPORTING).stdout)  # type: ignore[no-any-return]


def test_import_adds_nothing_to_torch_and_safetensors(imported: dict[str, Any]) -> None:
    assert set(imported["added"]) <= {"veneer", "veneer_as_peft"}


def test_none_of_the_heavy_libraries_is_loaded(imported: dict[str, Any]) -> None:
    assert not set(imported["loaded"]) & set(HEAVY)


def test_a_heavier_import_would_be_seen(imported: dict[str, Any]) -> None:
    assert {"typer", "huggingface_hub"} <= set(imported["added later"])


def test_import_draws_no_random_number_and_sets_nothing_global(imported: dict[str, Any]) -> None:
    assert not imported["changed"]


def test_torch_comes_with_the_first_name() -> None:
    assert set(json.loads(run_python(WITHOUT_A_NAME).stdout)) <= {"veneer", "veneer_as_peft"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["ls", "{folder}"], ["train", "--help"]])
def test_commands_that_compute_nothing_do_without_torch(arguments: list[str], tmp_path: Path) -> None:
    given = ["veneer", *(argument.format(folder=tmp_path) for argument in arguments)]
    done = run_python(
        "import sys\nfrom veneer.cli import main\n"
        f"sys.argv = {given!r}\ncode = main()\n"
        "print(code, sorted({'torch', 'numpy', 'safetensors'} & set(sys.modules)))"
    )
    assert done.stdout.splitlines()[-1] == "0 []"


@pytest.mark.parametrize("package", ["veneer.training", "veneer.training.data"])
def test_names_that_come_late_are_no_modules_of_their_package(package: str) -> None:
    # Importing such a module would put it in the place of the public name.
    found = importlib.import_module(package)
    assert found.__all__
    assert not {module.name for module in pkgutil.iter_modules(found.__path__)} & set(found.__all__)
