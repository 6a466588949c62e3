"""Filling an adapter that is there already, in place: `load_adapter` under its name, as trainers resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from veneer import LoraConfig, get_peft_model
from veneer.errors import BaseMismatchError, ConfigError, LoadMismatchError, MergeError, VeneerWarning
from veneer.hotswap import hotswap_adapter


def adapted(seed: int, alpha: int = 5, base: int = 0, **options: Any) -> Any:
    torch.manual_seed(base)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    config = LoraConfig(r=2, lora_alpha=alpha, target_modules=["0", "2"], **options)
    model = get_peft_model(net, config)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model


X = torch.arange(12.0).reshape(2, 6) / 10


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_values_change_and_the_parameters_stay(tmp_path: Path) -> None:
    model, saved = adapted(1), adapted(2)
    saved.save_pretrained(tmp_path)
    held = dict(model.named_parameters())
    frozen = {name: p.requires_grad for name, p in held.items()}
    report = model.load_adapter(tmp_path, "default", is_trainable=True)
    assert report.ok
    assert torch.equal(model(X), saved(X))
    assert all(p is held[name] for name, p in model.named_parameters()), "an optimiser may hold them"
    assert frozen == {name: p.requires_grad for name, p in model.named_parameters()}
    assert model.training
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]


def test_not_trainable_means_evaluation(tmp_path: Path) -> None:
    model = adapted(1).train()
    adapted(2).save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "default")
    assert not model.training


def test_another_strength_is_refused(tmp_path: Path) -> None:
    model = adapted(1, alpha=5)
    before = tensors(model)
    adapted(2, alpha=9).save_pretrained(tmp_path)
    with pytest.raises(LoadMismatchError, match=r"2\.5 here, 4\.5 in the file"):
        model.load_adapter(tmp_path, "default")
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors(model).items())
    assert model.load_adapter(tmp_path, "beside").ok


@pytest.mark.parametrize("option", ["trainable_token_indices", "alora_invocation_tokens"])
def test_other_tokens_are_refused(option: str, tmp_path: Path) -> None:
    def made(tokens: Any) -> Any:
        net = nn.Sequential(nn.Embedding(8, 6), nn.Linear(6, 8))
        task = "CAUSAL_LM" if option.startswith("alora") else None
        return get_peft_model(net, LoraConfig(target_modules=["1"], task_type=task, **{option: tokens}))

    named = option.startswith("train")
    made({"0": [1, 2]} if named else [1, 2]).save_pretrained(tmp_path)
    model = made({"0": [3, 4]} if named else [3, 4])
    before = tensors(model)
    with pytest.raises(LoadMismatchError, match=rf"{option}: .*\[3, 4\].* here, .*\[1, 2\].* in the file"):
        model.load_adapter(tmp_path, "default", check_base=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors(model).items())
    same = made({"0": [1, 2]} if named else [1, 2])
    assert same.load_adapter(tmp_path, "default", check_base=False).ok
    with pytest.raises(ConfigError, match=rf"{option}: .*\[3, 4\].* and .*\[1, 2\]"):
        hotswap_adapter(model, str(tmp_path), "default")
    made(None).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"{option}: .*\[3, 4\].* and None"):
        hotswap_adapter(model, str(tmp_path), "default")


def test_a_merged_adapter_is_refused(tmp_path: Path) -> None:
    model = adapted(1)
    adapted(2).save_pretrained(tmp_path)
    model.merge_adapter()
    with pytest.raises(MergeError, match="unmerge_adapter"):
        model.load_adapter(tmp_path, "default")
    model.unmerge_adapter()
    model.load_adapter(tmp_path, "default")
    assert torch.equal(model(X), adapted(2)(X))


def test_another_base_is_refused(tmp_path: Path) -> None:
    model = adapted(1, base=1)
    adapted(2, base=0).save_pretrained(tmp_path)
    with pytest.raises(BaseMismatchError):
        model.load_adapter(tmp_path, "default")
    model.load_adapter(tmp_path, "default", check_base=False)


def test_a_part_of_an_adapter_is_refused(tmp_path: Path) -> None:
    model = adapted(1)
    before = tensors(model)
    adapted(2).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(dict(list(load_file(file).items())[1:]), file, metadata={"format": "pt"})
    with pytest.raises(LoadMismatchError):
        model.load_adapter(tmp_path, "default")
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors(model).items())
    with pytest.warns(VeneerWarning, match="not in the file"):
        assert not model.load_adapter(tmp_path, "default", strict=False).ok
