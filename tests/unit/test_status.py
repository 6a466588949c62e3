"""The report of what state adapters are in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from veneer import (
    ConfigError,
    LoraConfig,
    TargetError,
    cast_mixed_precision_params,
    get_layer_status,
    get_model_status,
    get_peft_model,
    inject_adapter_in_model,
)


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def test_the_state_of_each_layer() -> None:
    model = get_peft_model(_net(), LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]), "a")
    model.add_adapter("b", LoraConfig(r=3, target_modules=["0"]))
    model.merge_adapter(["a"])
    first, second = get_layer_status(model)
    assert (first.name, first.module_type, second.module_type) == ("0", "LoraLinear", "ModulesToSaveWrapper")
    assert first.available_adapters == ["a", "b"] and second.available_adapters == ["a"]
    assert first.active_adapters == ["a"] and first.merged_adapters == ["a"] and second.merged_adapters == []
    assert first.requires_grad == {"a": True, "b": False} and first.devices == {"a": ["cpu"], "b": ["cpu"]}
    assert first.enabled and first.quantization_backend is None
    assert model.get_layer_status() == [first, second]


def test_the_state_of_the_model_and_where_it_is_irregular() -> None:
    model = get_peft_model(_net(), LoraConfig(r=2, target_modules=["0", "2"]), "a")
    status = get_model_status(model)
    assert (status.base_model_type, status.adapter_model_type) == ("Sequential", "LoraModel")
    assert status.peft_types == {"a": "LORA"} and status.num_adapter_layers == 2
    assert (status.trainable_params, status.total_params) == model.get_nb_trainable_parameters()
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["a"], [])
    layer = model.get_base_model()[0]
    layer.enable_adapters(False)
    layer.merge()
    layer.lora_A["a"].weight.requires_grad_(False)
    status = model.get_model_status()
    assert status.enabled == "irregular" and status.merged_adapters == "irregular"
    assert status.requires_grad == {"a": "irregular"}


def test_a_model_that_adapters_were_injected_into() -> None:
    net = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), _net(), "x")
    status = get_model_status(net)
    assert (status.base_model_type, status.adapter_model_type) == ("Sequential", "None")
    assert status.peft_types == {"x": "LORA"}


def test_the_adapters_as_a_table() -> None:
    model = get_peft_model(_net(), LoraConfig(r=2, target_modules=["0"]), "a")
    model.add_adapter("other", LoraConfig(r=3, target_modules=["0", "2"], rank_pattern={"2": 4}))
    assert repr(model.adapters) == (
        "adapter  rank  modules  parameters\n"
        "a           2        1          18  active, trainable\n"
        "other    3, 4        2          59"
    )
    assert model.adapters["other"].ranks == (3, 4)
    model.merge_adapter(["other"])
    assert model.adapters["other"].states == ("merged",)
    with model.disable_adapter():
        assert model.adapters["a"].states == ("active", "trainable", "disabled")
    model.set_adapter("other")
    model.get_base_model()[0].lora_A["other"].weight.requires_grad_(False)
    assert model.adapters["other"].states == ("active", "merged", "trainable in part")
    model.delete_adapter("a")
    with pytest.warns(UserWarning, match="none is left"):
        model.delete_adapter("other")
    assert repr(model.adapters) == "no adapters" and not model.adapters


def test_no_adapter_is_said() -> None:
    with pytest.raises(TargetError, match="holds no adapter"):
        get_layer_status(_net())


def test_casting_for_mixed_precision_keeps_the_parameters_and_the_integers() -> None:
    model = get_peft_model(_net(), LoraConfig(r=2, target_modules=["0"]))
    model.get_base_model().register_parameter("codes", nn.Parameter(torch.arange(3), requires_grad=False))
    before = list(model.parameters())
    cast_mixed_precision_params(model, torch.bfloat16)
    assert [id(p) for p in model.parameters()] == [id(p) for p in before]
    kinds = {p.dtype for p in model.parameters() if p.requires_grad}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert kinds == {torch.float32} and frozen == {torch.bfloat16, torch.int64}
    with pytest.raises(ConfigError, match=r"floating-point type .*, got torch\.int8"):
        cast_mixed_precision_params(model, torch.int8)
    assert torch.int8 not in {p.dtype for p in model.parameters()}


def test_rows_of_tokens_that_are_merged_are_said() -> None:
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3))
    config = LoraConfig(r=2, target_modules=["1"], trainable_token_indices={"0": [1, 2]})
    model = get_peft_model(net, config, "a")
    assert get_model_status(model).merged_adapters == []
    model.merge_adapter()
    assert {layer.name: layer.merged_adapters for layer in get_layer_status(model)} == {
        "0": ["a"],
        "1": ["a"],
    }
    assert get_model_status(model).merged_adapters == ["a"]
