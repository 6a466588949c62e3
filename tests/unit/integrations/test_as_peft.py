"""The small functions that only other libraries call, each against what it promises."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.net import IDS, Net, adapted
from veneer import LoraConfig, get_peft_model_state_dict
from veneer.errors import VeneerError
from veneer.files.keys import to_disk
from veneer.integrations.as_peft import objects


@pytest.mark.parametrize("adapter", ["default", "a", "lora_A", "weight"])
def test_names_go_from_file_to_memory_and_back(adapter: str) -> None:
    from veneer.integrations.as_peft.weights import to_memory

    names = [
        "base_model.model.a.first.lora_A.weight",
        "base_model.model.a.first.lora_B.weight",
        "base_model.model.a.first.lora_B.bias",
        "base_model.model.a.table.lora_embedding_A",
        "base_model.model.a.table.lora_embedding_B",
        "base_model.model.a.first.lora_magnitude_vector",
        "base_model.model.a.table.token_adapter.trainable_tokens_delta",
        "base_model.model.a.first.base_layer.bias",
        "base_model.model.model.norm.bias",
        "base_model.model.score.weight",
    ]
    for name in names:
        assert f"base_model.model.{to_disk(to_memory(name, adapter), adapter)}" == name
    assert to_memory("a.first.lora_A.weight", adapter) == f"a.first.lora_A.{adapter}.weight"
    assert to_memory("a.lora_A_like.weight", adapter) == "a.lora_A_like.weight"


def test_rescaling_is_for_a_while() -> None:
    model = adapted()
    full, layer = model(IDS), model.base_model.model.first
    base = dict(layer.scaling)
    with objects.rescale_adapter_scale(model, 0.5):
        assert layer.scaling == {"default": base["default"] * 0.5}
        assert not torch.allclose(model(IDS), full)
    assert layer.scaling == base and torch.equal(model(IDS), full)
    with pytest.raises(ZeroDivisionError), objects.rescale_adapter_scale(model, 0):
        raise ZeroDivisionError
    assert torch.equal(model(IDS), full)
    with pytest.raises(VeneerError, match="no adapter"), objects.rescale_adapter_scale(Net(), 0.5):
        pass
    with pytest.raises(TypeError, match="number"), objects.rescale_adapter_scale(model, "0.5"):  # type: ignore[arg-type]
        pass


def test_the_functional_verbs() -> None:
    model = adapted()
    model.add_adapter("second", LoraConfig(r=3, target_modules=["first"]))
    objects.set_adapter(model, ["default", "second"])
    assert model.active_adapters == ["default", "second"]
    objects.set_requires_grad(model, "default", False)
    trainable = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"second"}
    assert objects.delete_adapter(model, "second", prefix="lora_") == ["default"]
    assert "second" not in model.base_model.model.first.lora_A
    half = adapted().to(torch.bfloat16)
    objects.cast_adapter_dtype(half, "default", autocast_adapter_dtype=False)
    assert {p.dtype for n, p in half.named_parameters() if "lora_" in n} == {torch.bfloat16}
    objects.cast_adapter_dtype(half, "default")
    assert {p.dtype for n, p in half.named_parameters() if "lora_" in n} == {torch.float32}
    assert {p.dtype for n, p in half.named_parameters() if "lora_" not in n} == {torch.bfloat16}


def test_signatures_can_be_made_those_of_the_base() -> None:
    model = adapted()
    wanted = model(IDS, scale=2.0)
    objects.update_forward_signature(model)
    assert list(inspect.signature(model.forward).parameters) == ["ids", "scale"]
    assert torch.equal(model(IDS, scale=2.0), wanted)
    with pytest.raises(VeneerError, match="'other'"):
        objects.update_signature(model, "other")


def test_an_adapter_is_told_from_what_is_none(tmp_path: Any) -> None:
    adapted().save_pretrained(tmp_path / "adapter")
    assert objects.check_if_peft_model(str(tmp_path / "adapter"))
    assert not objects.check_if_peft_model(str(tmp_path))


def test_fsdp_units_are_blocks_and_trainable_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LoraLinear")
    policy = objects.fsdp_auto_wrap_policy(model)
    units = {
        name
        for name, module in model.named_modules()
        if policy(module=module, recurse=False, nonwrapped_numel=0)
    }
    inner = "base_model.model"
    factors = {f"{inner}.{path}.lora_{x}.default" for path in ("first", "second") for x in "AB"}
    assert units == factors | {f"{inner}.first", f"{inner}.second"}
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "NoSuchBlock")
    with pytest.raises(VeneerError, match="NoSuchBlock"):
        objects.fsdp_auto_wrap_policy(model)


def test_submodules_and_places() -> None:
    model = adapted()
    parent, target, name = objects._get_submodules(model, "base_model.model.first")
    assert parent is model.base_model.model and target is parent.first and name == "first"
    with objects.init_empty_weights():
        assert nn.Linear(3, 3).weight.is_meta
    with objects.gather_params_ctx(target.weight), objects.disable_input_dtype_casting(model):
        assert torch.equal(model(IDS), adapted()(IDS))
    assert objects.infer_device() in ("cpu", "cuda", "mps")
    assert set(get_peft_model_state_dict(model))
