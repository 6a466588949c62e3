"""Adapters that wait elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.laws.cases import train
from tests.tolerances import assert_close
from veneer import AdapterFileError, AdapterNameError, ConfigError, LoraConfig, PeftModel, get_peft_model

X = torch.linspace(-1, 1, 12).view(3, 4)


def model(dtype: torch.dtype = torch.float32, **more: Any) -> PeftModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).to(dtype)
    result = get_peft_model(net, LoraConfig(r=2, target_modules=["0"]), "a", autocast_adapter_dtype=False)
    options = {"r": 3, "lora_alpha": 5, "target_modules": ["0"], "modules_to_save": ["2"], **more}
    result.add_adapter("b", LoraConfig(**options), autocast_adapter_dtype=False)
    for seed, name in enumerate("ab"):
        train(result, name, seed)
    return result.eval()


def outputs(of: PeftModel) -> torch.Tensor:
    of.set_adapter("b")
    given = of(X.to(next(of.parameters()).dtype))
    of.set_adapter("a")
    return given


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"lora_bias": True, "use_rslora": True}])
@pytest.mark.parametrize("on_disk", [True, False])
def test_a_parked_adapter_comes_back_by_its_name_bit_for_bit(
    tmp_path: Path, on_disk: bool, more: dict[str, Any], dtype: torch.dtype
) -> None:
    parked = model(dtype, **more)
    parked.base_model.set_strength("b", 0.5)
    expected = outputs(parked)
    parked.park_adapter("b", tmp_path if on_disk else None)
    assert dict(parked.parked_adapters) == {"b": tmp_path / "b" if on_disk else None}
    assert any("b" in layer.held_adapters for layer in parked.base_model.index.modules()) == (not on_disk)
    assert torch.equal(outputs(parked), expected)
    assert not parked.parked_adapters and parked.active_adapters == ["a"]


def test_a_mixed_batch_brings_them_in(tmp_path: Path) -> None:
    parked = model()
    expected = outputs(parked)
    parked.park_adapter("b", tmp_path)
    mixed = parked(X, adapter_names=["a", "b", "a"])
    assert_close(mixed[1], expected[1])
    assert not parked.parked_adapters


def test_what_cannot_be_parked_stays(tmp_path: Path) -> None:
    parked = model()
    with pytest.raises(AdapterNameError, match="'a' is active"):
        parked.park_adapter("a")
    with pytest.raises(AdapterNameError, match="no adapter named 'c'"):
        parked.park_adapter("c")
    parked.merge_adapter(["b"])
    with pytest.raises(AdapterNameError, match="merged"):
        parked.park_adapter("b")
    tokens = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3))
    rows = get_peft_model(tokens, LoraConfig(target_modules=["1"]), "a")
    rows.add_adapter("b", LoraConfig(target_modules=["1"], trainable_token_indices={"0": [1]}))
    tokens[0].merge(adapter_names=["b"])
    with pytest.raises(AdapterNameError, match="merged"):
        rows.park_adapter("b")
    with pytest.raises(ConfigError, match="trains biases of the base"):
        model(bias="all").park_adapter("b", tmp_path)
    assert not parked.parked_adapters


def test_a_file_that_is_gone_is_said_and_forgetting_keeps_the_files(tmp_path: Path) -> None:
    parked = model()
    parked.park_adapter("b", tmp_path / "here")
    (tmp_path / "here" / "b" / "adapter_model.safetensors").rename(tmp_path / "moved")
    with pytest.raises(AdapterFileError):
        parked.set_adapter("b")
    assert parked.active_adapters == ["a"] and "b" in parked.parked_adapters
    (tmp_path / "moved").rename(tmp_path / "here" / "b" / "adapter_model.safetensors")
    parked.delete_adapter("b")
    assert not parked.parked_adapters
    assert (tmp_path / "here" / "b" / "adapter_model.safetensors").is_file()
    with pytest.raises(AdapterNameError, match="no adapter named 'b'"):
        parked.set_adapter("b")
