"""Loading bases: code that they bring is not run, and messages say what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.training.tiny import saved_tiny, tiny_model
from veneer import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    TrainingError,
    get_peft_model,
)
from veneer.training import load_base, models
from veneer.training.adapters import load_adapted
from veneer.training.planning import empty_model


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that brings code of its own, in front of a user who would answer yes."""
    place = saved_tiny(tmp_path / "own")
    marker = tmp_path / "ran"
    for name, key, classes in (
        ("config.json", "model_type", {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}),
        ("tokenizer_config.json", "tokenizer_class", {"AutoTokenizer": ["code.T", None]}),
    ):
        content = json.loads((place / name).read_text())
        content |= {key: "own", "auto_map": classes}
        (place / name).write_text(json.dumps(content))
    (place / "code.py").write_text(
        f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nraise OSError('ran')\n"
    )
    monkeypatch.setattr("builtins.input", lambda *words: "y")
    return place


LOADERS: dict[str, Callable[[Path], object]] = {
    "base": load_base,
    "tokenizer": models.load_tokenizer,
    "plan": empty_model,
    "task class": lambda place: AutoPeftModelForCausalLM.from_pretrained(adapter_on(place)),
}


def adapter_on(place: Path) -> Path:
    adapted: Any = get_peft_model(
        tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    adapted.peft_config["default"].base_model_name_or_path = str(place)
    adapted.save_pretrained(place.parent / "adapter")
    return place.parent / "adapter"


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_code_that_a_model_brings_is_neither_run_nor_asked_about(
    load: Callable[[Path], object], own_code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("asked"))
    with pytest.raises((TrainingError, ValueError)):
        load(own_code)
    assert not (own_code.parent / "ran").exists()


def test_the_tokenizer_beside_an_adapter_runs_no_code(own_code: Path) -> None:
    base = saved_tiny(own_code.parent / "base")
    adapter = adapter_on(base)
    for name in ("tokenizer_config.json", "tokenizer.json", "code.py"):
        (adapter / name).write_bytes((own_code / name).read_bytes())
    with pytest.raises((TrainingError, ValueError)):
        load_adapted(adapter, str(base))
    with pytest.raises((TrainingError, ValueError)):
        AutoPeftModelForCausalLM.from_pretrained(adapter)
    assert not (own_code.parent / "ran").exists()


def test_a_base_with_code_of_its_own_may_be_asked_for_in_python(own_code: Path) -> None:
    with pytest.raises(OSError, match="ran"):
        AutoPeftModelForCausalLM.from_pretrained(adapter_on(own_code), trust_remote_code=True)
    assert (own_code.parent / "ran").exists()


def test_loading_a_base(tmp_path: Path) -> None:
    model, tokenizer = load_base(saved_tiny(tmp_path), "bfloat16")
    assert next(model.parameters()).dtype == torch.bfloat16
    assert tokenizer.chat_template
    expected = tiny_model().model.embed_tokens.weight
    assert torch.equal(model.model.embed_tokens.weight.float(), expected.bfloat16().float())


def test_loading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="it does not exist"):
        load_base(tmp_path / "nowhere")
    with pytest.raises(TrainingError, match=r"has no config\.json"):
        load_base(tmp_path)
    with pytest.raises(TrainingError, match="'someone/something' cannot be loaded"):
        load_base("someone/something")


@pytest.mark.parametrize("load", [models.load_tokenizer, load_base, empty_model])
def test_an_unreachable_hub_is_asked_once(load: Callable[[str], object], unreachable_hub: str) -> None:
    with pytest.raises(TrainingError, match=f"the hub at {unreachable_hub} does not answer"):
        load("someone/something")


@pytest.mark.parametrize(
    ("name", "kind"), [("nf4", "Linear4bit"), ("fp4", "Linear4bit"), ("int8", "Linear8bitLt")]
)
def test_a_base_in_few_bits(name: str, kind: str, tmp_path: Path) -> None:
    model, _ = load_base(saved_tiny(tmp_path / "base"), quantize=name)
    kinds = {type(module).__name__ for module in model.model.modules() if hasattr(module, "in_features")}
    assert kinds == {kind}


def test_four_bit_integers_need_a_gpu_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TrainingError, match=r"int4' needs a GPU.*nf4, fp4 and int8"):
        models.quantization("int4")
