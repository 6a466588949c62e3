"""Veneer brings in torch and safetensors with its first public name, and nothing else that is not its own."""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path

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
LISTING = """
import json, sys
{first}
before = set(sys.modules)
{then}
tops = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(json.dumps(sorted(top for top in tops if top not in sys.stdlib_module_names)))
"""


def brought_in_by(first: str, then: str) -> set[str]:
    """The top-level packages that `then` imports beyond `first`."""
    return set(json.loads(run_python(LISTING.format(first=first, then=then)).stdout))


def test_import_adds_nothing_to_torch_and_safetensors() -> None:
    ours = {"veneer", "veneer_as_peft"}
    assert brought_in_by("import torch, safetensors.torch", "from veneer import *") <= ours


def test_none_of_the_heavy_libraries_is_loaded() -> None:
    loaded = brought_in_by("", "from veneer import get_peft_model")
    assert "torch" in loaded
    assert not loaded & set(HEAVY)


def test_torch_comes_with_the_first_name() -> None:
    assert brought_in_by("", "import veneer, veneer.errors; veneer.__version__; veneer.errors") <= {
        "veneer",
        "veneer_as_peft",
    }


@pytest.mark.parametrize("extra", ["typer", "huggingface_hub"])
def test_a_heavier_import_would_be_seen(extra: str) -> None:
    assert extra in brought_in_by("import torch, safetensors.torch", f"import veneer, {extra}")


def test_import_draws_no_random_number_and_sets_nothing_global() -> None:
    run_python(
        "import torch, warnings, logging\n"
        "look = lambda: (torch.get_rng_state().tolist(), torch.get_num_threads(),\n"
        "                torch.get_default_dtype(), list(warnings.filters),\n"
        "                logging.getLogger().handlers, logging.getLogger().level)\n"
        "before = look()\n"
        "import veneer; veneer.LoraConfig\n"
        "assert look() == before"
    )


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
