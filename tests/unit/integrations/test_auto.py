"""Adapters that bring their base along: what the configuration has to say for that."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.training.tiny import tiny_model
from veneer import (
    AdapterFileError,
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    ConfigError,
    LoraConfig,
    MissingExtraError,
    PeftModelForCausalLM,
    get_peft_model,
)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "base")
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    change(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"), auto_mapping=None)
    return tmp_path / "adapter"


def change(adapter: Path, **values: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_another_task_is_refused(adapter: Path) -> None:
    assert isinstance(AutoPeftModel.from_pretrained(adapter), PeftModelForCausalLM)
    with pytest.raises(ConfigError, match=r"is for CAUSAL_LM, and .* is for SEQ_CLS"):
        AutoPeftModelForSequenceClassification.from_pretrained(adapter)


def test_an_adapter_without_a_task_has_no_kind_of_base(adapter: Path) -> None:
    change(adapter, task_type=None)
    assert isinstance(AutoPeftModelForCausalLM.from_pretrained(adapter), PeftModelForCausalLM)
    with pytest.raises(AdapterFileError, match="no task_type"):
        AutoPeftModel.from_pretrained(adapter)


def test_an_adapter_that_names_no_base_is_refused(adapter: Path) -> None:
    change(adapter, base_model_name_or_path=None)
    with pytest.raises(AdapterFileError, match="does not name its base model"):
        AutoPeftModel.from_pretrained(adapter)


def test_without_transformers_the_line_that_installs_it_is_named(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'veneer\[hf\]'"):
        AutoPeftModel.from_pretrained(adapter)
