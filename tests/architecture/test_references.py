"""No definition without a reference, in the package and in small trees in which one has none."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import veneer_as_peft
from tests.architecture.references import Package, Reach
from veneer.integrations.as_peft.layout import LAYOUT

SOURCE = Path(__file__).parents[2] / "src"
PUBLIC = (
    "veneer.public",
    "veneer.training.public",
    "veneer.tools.public",
    "veneer.testing",
    "veneer_as_peft",
    "veneer.as_peft",
)
FACADE = veneer_as_peft.FACADE

#: Methods that only other libraries call, by the class of theirs that ours inherits from, or by ours.
CALLED = {
    # torch.nn, for `print`, `.to`, `state_dict` and DataParallel.
    "Module": {
        "extra_repr",
        "_apply",
        "_save_to_state_dict",
        "_load_from_state_dict",
        "_replicate_for_data_parallel",
    },
    "ModuleDict": {"_save_to_state_dict", "_load_from_state_dict"},
    # rich, for every text that is printed.
    "Console": {"render_str"},
    # torch.nn.TransformerEncoderLayer reads it of its attention.
    "LoraMultiheadAttention": {"_qkv_same_embed_dim"},
    # It stands for a tensor in the code of other models.
    "AdaptedWeight": {"mT"},
    # transformers, in training.
    "Trainer": {"compute_loss"},
    "TrainerCallback": {"on_train_begin", "on_step_begin", "on_step_end", "on_log", "on_save"},
    # It stands for a callback of transformers' Trainer.
    "Thinned": {"on_log"},
    # The import system, and importlib.metadata.
    "Loader": {"create_module", "exec_module"},
    "DistributionFinder": {"find_distributions"},
    "Distribution": {"locate_file"},
    # transformers, on each key of an adapter's file.
    "WeightRenaming": {"rename_source_key"},
    # lm-evaluation-harness.
    "HFLM": {"_create_model", "_loglikelihood_tokens", "_model_generate"},
    # vLLM.
    "LoRAResolver": {"resolve_lora"},
}


def public_names() -> set[str]:
    """All that users, PEFT's users, and libraries that import PEFT or a model of ours may name."""
    public = {f"{module}:{name}" for module in PUBLIC for name in importlib.import_module(module).__all__}
    facade = {f"{FACADE}.objects:{name}" for names in LAYOUT.values() for name in names}
    guards = {
        f"{FACADE}.{module}:{name}" for _, module, names in veneer_as_peft.GUARDED.values() for name in names
    }
    registered = {"veneer.integrations.lm_eval:VeneerLM", "veneer.integrations.vllm:register"}
    return public | facade | guards | registered


@pytest.fixture(scope="module")
def reach() -> Reach:
    return Reach(Package(SOURCE), public_names(), CALLED)


def test_every_definition_is_reached(reach: Reach) -> None:
    unreached = [f"{d.module}:{d.line} {d.name}" for d in reach.unreached()]
    assert not unreached, "nothing but tests uses these:\n" + "\n".join(unreached)


def test_what_other_libraries_call_is_there(reach: Reach) -> None:
    assert {(base, name) for base, names in CALLED.items() for name in names} == reach.used


def unreached(root: Path, files: dict[str, str]) -> list[str]:
    """What nothing reaches in these modules, where `p.public:f` is public."""
    for name, text in files.items():
        place = root / f"{name}.py"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    return [d.name for d in Reach(Package(root), ["p.public:f"], {"Theirs": {"called"}}).unreached()]


CASES = {
    "a function": ("def f(): return g()\ndef g(): ...\ndef dead(): ...", ["dead"]),
    "a constant": ("A = 1\nDEAD = 2\ndef f(): return A", ["DEAD"]),
    "a class and what is in it": ("class Dead:\n    def g(self): ...\ndef f(): ...", ["Dead", "Dead.g"]),
    "a method": (
        "class C:\n    def g(self): ...\n    def dead(self): ...\ndef f(): return C().g()",
        ["C.dead"],
    ),
    "a private method of a public class": (
        "class f:\n    def g(self): return self._h()\n    def _h(self): ...\n    def _dead(self): ...",
        ["f._dead"],
    ),
    "an attribute": ("class f:\n    _a = 1\n    _dead = 2\n    def g(self): return self._a", ["f._dead"]),
    "an attribute that is only set": (
        "class f:\n    _dead = 0\n    def g(self): self._dead = 1",
        ["f._dead"],
    ),
    "a class variable, but not a field": ("class f:\n    a: int\n    _dead: ClassVar[int] = 1", ["f._dead"]),
    "two that name one another": ("def f(): ...\ndef a(): return b()\ndef b(): return a()", ["a", "b"]),
    "one that names itself": ("def f(): ...\ndef dead(): return dead()", ["dead"]),
    "a function called like an attribute": ("def f(x): return x.dead\ndef dead(): ...", ["dead"]),
    "a plug-in": ("class A:\n    def __init_subclass__(cls): ...\nclass B(A): ...\ndef f(): return A", []),
    "what is registered": ("def register(f): return f\n@register\ndef g(): ...\ndef f(): ...", []),
    "what another library calls": (
        "from theirs import Theirs\nclass f(Theirs):\n    def called(self): return self._g()\n"
        "    def _g(self): ...",
        [],
    ),
    "what a string names": ("class C:\n    def g(self): ...\ndef f(): return getattr(C(), 'g')", []),
    "what runs on import": ("def g(): ...\nif g():\n    g()\ndef f(): ...", []),
}


@pytest.mark.parametrize("case", CASES)
def test_a_definition_without_a_reference_is_found(case: str, tmp_path: Path) -> None:
    text, expected = CASES[case]
    assert unreached(tmp_path, {"p/public": text}) == expected


def test_references_are_followed_from_module_to_module(tmp_path: Path) -> None:
    files = {
        "p/__init__": "from .passed import passed_on",
        "p/passed": "def passed_on(): ...\ndef dead(): ...",
        "p/whole": "def g(): ...\ndef dead(): ...",
        "p/late": "def g(): ...\ndef dead(): ...",
        "p/relative": "def h(): ...\ndef dead(): ...",
        "p/public": (
            "from . import whole\nfrom p import passed_on\nimport p.whole as again\n"
            "def f():\n    passed_on(), whole.g(), again.g(), importlib.import_module('p.late').g()\n"
            "    importlib.import_module(f'{__package__}.relative').h()"
        ),
    }
    assert unreached(tmp_path, files) == ["dead"] * 4
