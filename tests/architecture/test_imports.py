"""The direction of imports, in the package and in small trees that break each rule."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architecture import import_rules
from tests.processes import run_python

PACKAGE = Path(__file__).parents[2] / "src" / "veneer"


def test_package_keeps_the_direction_of_imports() -> None:
    breaches = import_rules.check(PACKAGE)
    assert not breaches, "\n".join(breaches)


def test_every_unit_of_the_design_is_ranked_once() -> None:
    units = [unit for rank in import_rules.RANKS for unit in rank]
    assert len(units) == len(set(units))


def test_the_module_beside_the_package_is_stdlib_only_at_import() -> None:
    # It runs at interpreter start, before torch, and in interpreters that never use Veneer.
    done = run_python(
        "import sys; before = set(sys.modules); import veneer_as_peft\n"
        "tops = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(top for top in tops if top not in sys.stdlib_module_names))"
    )
    assert done.stdout.split() == ["veneer_as_peft"]


def tree(root: Path, **files: str) -> Path:
    for name in ("config", "spec", "targets", "lora_model", "inject", "files", "arithmetic"):
        (root / f"{name}.py").write_text("")
    for folder in ("ops", "layers", "inits", "variants", "backends", "integrations", "cli", "training"):
        (root / folder).mkdir()
        (root / folder / "__init__.py").write_text("")
    for name, text in files.items():
        (root / (name.replace("__", "/") + ".py")).write_text(text)
    return root


ALLOWED = [
    ("spec", "from veneer.config import LoraConfig"),
    (
        "layers__linear",
        "import torch\nfrom .base import Layer\nfrom ..ops import dropout\nfrom veneer import inits",
    ),
    ("inits__pissa", "from ..ops import low_rank\nfrom . import base\nimport veneer.ops.dropout"),
    ("backends__bitsandbytes", "def f():\n    import bitsandbytes"),
    (
        "integrations__hub",
        "def f():\n    from huggingface_hub import hf_hub_download\n    from ..lora_model import X",
    ),
    ("hub", "def f():\n    from huggingface_hub import hf_hub_download"),
    ("config", "from .files.layout import find_config"),
    ("training__run", "from veneer import LoraConfig, get_peft_model\nfrom ..integrations import hub"),
    ("lora_model", "import safetensors.torch\nfrom .inject import inject"),
    ("ops__triton_lora", "import triton\nfrom veneer.ops import triton_kernels"),
    ("ops__gpu", "def _checked_step():\n    from veneer.ops import triton_lora"),
]
BREACHES = [
    ("config", "from .spec import LoraSpec", "to the right of"),
    ("config", "from . import spec", "to the right of"),
    ("config", "import veneer.lora_model", "to the right of"),
    ("config", "import torch", "standard library alone"),
    ("targets", "import torch", "standard library alone"),
    ("targets", "from veneer.inits import base", "beside"),
    ("inits__pissa", "from ..variants import dora", "beside"),
    ("ops__merging", "from ..backends import dense", "to the right of"),
    ("layers__linear", "from ...veneer.layers import layer\nfrom ..inject import inject", "to the right of"),
    ("inject", "from .arithmetic import combine", "beside"),
    ("lora_model", "from .integrations.hub import fetch", "to the right of"),
    ("lora_model", "def f():\n    from .integrations import hub", "inside f()"),
    ("lora_model", "class M:\n    def g(self):\n        import torch", "inside g()"),
    (
        "lora_model",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .cli import main",
        "to the right of",
    ),
    ("lora_model", "from importlib import import_module\nx = import_module('veneer.cli')", "to the right of"),
    ("lora_model", "import transformers", "not transformers"),
    ("layers__conv", "import numpy as np", "not numpy"),
    ("lora_model", "from veneer import LoraConfig", "from the package root"),
    ("integrations__hub", "from veneer import LoraConfig", "from the package root"),
    ("integrations__hub", "from ..training import run", "to the right of"),
    ("ops__triton_lora", "import numpy", "not numpy"),
    ("ops__gpu", "import triton", "not triton"),
    ("ops__gpu", "from veneer.ops import triton_lora", "through its door"),
    ("ops__gpu", "from veneer.ops.triton_kernels import product", "through its door"),
    ("ops__gpu", "def other():\n    from . import triton_lora", "inside other()"),
    ("training__run", "def f():\n    from ..ops.triton_lora import TritonLora", "through its door"),
    ("helpers", "", "no place in RANKS"),
]


@pytest.mark.parametrize(("name", "text"), ALLOWED)
def test_rules_allow(tmp_path: Path, name: str, text: str) -> None:
    assert import_rules.check(tree(tmp_path, **{name: text})) == []


@pytest.mark.parametrize(("name", "text", "words"), BREACHES)
def test_rules_report(tmp_path: Path, name: str, text: str, words: str) -> None:
    breaches = import_rules.check(tree(tmp_path, **{name: text}))
    assert len(breaches) == 1, breaches
    assert words in breaches[0]
    assert breaches[0].startswith(name.replace("__", "/") + ".py")


def test_no_files_import_one_another_in_a_circle() -> None:
    assert import_rules.circles(PACKAGE) == []


def test_a_circle_would_be_seen(tmp_path: Path) -> None:
    package = tree(
        tmp_path, layers__a="from .b import x", layers__b="def f():\n    from veneer.layers import a"
    )
    assert import_rules.circles(package) == [["veneer.layers.a", "veneer.layers.b"]]
