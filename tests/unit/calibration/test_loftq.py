"""LoftQ on a model that is quantised already: nearer to the unquantised one, layer by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.storages import QUANTISED
from veneer import (
    AdapterNameError,
    CheckpointError,
    ConfigError,
    LoraConfig,
    MergeError,
    PeftModel,
    TargetError,
    VeneerWarning,
    get_peft_model,
    replace_lora_weights_loftq,
)
from veneer.backends import find

KINDS = ("bitsandbytes-4bit", "bitsandbytes-8bit", "torchao", "hqq")


def dense() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 128))


def quantised(kind: str) -> nn.Sequential:
    model = dense()
    return nn.Sequential(QUANTISED[kind](model[0]), model[1], QUANTISED[kind](model[2]))


def adapted(kind: str, r: int = 8) -> PeftModel:
    return get_peft_model(quantised(kind), LoraConfig(r=r, lora_alpha=3 * r, target_modules=["0", "2"]))


def saved(place: Path) -> Path:
    save_file(dense().state_dict(), place / "model.safetensors")
    return place


def errors(model: PeftModel) -> dict[str, float]:
    result = {}
    for path, layer in model.base_model.layers().items():
        weight: Tensor = dense().get_submodule(path).weight
        whole = layer.matrix().float() + layer.get_delta_weight("default").float()
        result[path] = float((whole - weight).detach().norm())
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_comes_nearer_to_its_unquantised_weight(tmp_path: Path, kind: str) -> None:
    model = adapted(kind)
    before = errors(model)
    stored = {path: layer.matrix().clone() for path, layer in model.base_model.layers().items()}
    parameters = [id(p) for p in model.parameters()]
    replace_lora_weights_loftq(model, saved(tmp_path))
    after = errors(model)
    assert all(after[path] < 0.95 * before[path] for path in before), (before, after)
    assert [id(p) for p in model.parameters()] == parameters
    assert all(torch.equal(x.matrix(), stored[path]) for path, x in model.base_model.layers().items())
    larger = adapted(kind, r=32)
    replace_lora_weights_loftq(larger, tmp_path / "model.safetensors")
    assert all(errors(larger)[path] < after[path] for path in after)


def test_the_callback_decides_layer_by_layer(tmp_path: Path) -> None:
    model, seen = adapted("bitsandbytes-4bit"), []

    def only_the_last(given: nn.Module, name: str) -> bool:
        seen.append(name)
        assert given is model
        return name == "2"

    before = errors(model)
    replace_lora_weights_loftq(model, saved(tmp_path), callback=only_the_last)
    assert seen == ["0", "2"]
    assert errors(model)["0"] == before["0"] and errors(model)["2"] < before["2"]


def test_files_in_parts(tmp_path: Path) -> None:
    state = dense().state_dict()
    save_file({n: t for n, t in state.items() if n[0] == "0"}, tmp_path / "model-1-of-2.safetensors")
    save_file({n: t for n, t in state.items() if n[0] == "2"}, tmp_path / "model-2-of-2.safetensors")
    index = {"weight_map": {n: f"model-{1 if n[0] == '0' else 2}-of-2.safetensors" for n in state}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    one, two = adapted("bitsandbytes-4bit"), adapted("bitsandbytes-4bit")
    replace_lora_weights_loftq(one, tmp_path)
    (tmp_path / "whole").mkdir()
    replace_lora_weights_loftq(two, saved(tmp_path / "whole"))
    assert errors(one) == errors(two)


def test_what_cannot_be_done_is_said_and_nothing_has_changed(tmp_path: Path) -> None:
    model = adapted("bitsandbytes-4bit")
    before = errors(model)
    with pytest.raises(ConfigError, match="pass model_path"):
        replace_lora_weights_loftq(model)
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors"):
        replace_lora_weights_loftq(model, tmp_path)
    save_file({"0.weight": torch.zeros(64, 128)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="lack 1 of the 2 layers, for example 2"):
        replace_lora_weights_loftq(model, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        replace_lora_weights_loftq(model, tmp_path)
    assert errors(model) == before
    with pytest.raises(ConfigError, match="PeftModel is needed, got Sequential"):
        replace_lora_weights_loftq(model.get_base_model(), tmp_path)
    with pytest.raises(AdapterNameError, match=r"'other'.*default"):
        replace_lora_weights_loftq(model, tmp_path, adapter_name="other")
    plain = get_peft_model(dense(), LoraConfig(r=2, lora_alpha=3, target_modules=["0"]))
    with pytest.raises(ConfigError, match="init_lora_weights='loftq'"):
        replace_lora_weights_loftq(plain, saved(tmp_path))
    replace_lora_weights_loftq(model, tmp_path)
    with pytest.warns(VeneerWarning, match="survives rounding"):
        model.merge_adapter()
    with pytest.raises(MergeError, match="unmerge"):
        replace_lora_weights_loftq(model, tmp_path)


@pytest.mark.parametrize("kind", QUANTISED)
def test_starting_from_codes_is_refused_with_the_way_that_the_storage_has(kind: str) -> None:
    model = quantised(kind)
    readable = find(model[0]).readable
    with pytest.raises(TargetError, match="needs the unquantised weight") as caught:
        get_peft_model(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights="loftq"))
    assert ("replace_lora_weights_loftq" in str(caught.value)) is readable
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["0", "2"]))
    if not readable:  # so the other way is none
        with pytest.raises(ConfigError, match="on a quantised weight that can be read"):
            replace_lora_weights_loftq(model)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t.update({"2.weight": t["2.weight"].to(torch.float8_e4m3fn)}),
            "2: its weight holds 8-bit floats",
        ),
        (lambda t: t.update({"2.weight_scale_inv": torch.ones(1)}), "2: .* as weight_scale_inv"),
        (lambda t: t.update({"2.weight": t["2.weight"].to(torch.int8)}), "2: it is stored as I8"),
    ],
    ids=["float8", "a scale beside it", "int8"],
)
def test_files_of_codes_are_not_the_unquantised_weights(tmp_path: Path, change: Any, said: str) -> None:
    tensors = dense().state_dict()
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    model = adapted("bitsandbytes-4bit")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(CheckpointError, match=said):
        replace_lora_weights_loftq(model, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
