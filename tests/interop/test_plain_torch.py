"""A model of plain torch modules, adapted in place: trained, its state taken and given, reloaded, merged."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.interop.reference import peft
from tests.tolerances import assert_close
from veneer import (
    LoraConfig,
    PeftModel,
    get_base_model_state_dict,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from veneer.errors import LoadMismatchError, VeneerWarning
from veneer.files.layout import SAFETENSORS_NAME
from veneer.layers import LoraLayer

OPTIONS = {
    "r": 2,
    "lora_alpha": 6,
    "target_modules": ["embed", "conv", "gate", "mix"],
    "rank_pattern": {"mix": 3},
    "alpha_pattern": {"conv": 5},
    "modules_to_save": ["head"],
}
IDS = torch.arange(24).reshape(4, 6) % 20


class Reader(nn.Module):
    """An embedding, a convolution, two linears in a dict, a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.parts = nn.ModuleDict({"gate": nn.Linear(8, 8, bias=False), "mix": nn.Linear(8, 8)})
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        """(batch, length) -> (batch, 3)."""
        x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        x = torch.sigmoid(self.parts["gate"](x)) * torch.tanh(self.parts["mix"](x))
        out: Tensor = self.head(x.mean(1))
        return out


@pytest.fixture
def base() -> Reader:
    """Frozen, as it is below an adapter: torch computes a trained linear in another order."""
    return Reader().eval().requires_grad_(False)


def adapted(base: nn.Module, adapter: str = "default") -> Reader:
    model = inject_adapter_in_model(LoraConfig(**OPTIONS), copy.deepcopy(base), adapter)
    assert isinstance(model, Reader)
    return model


def train(model: nn.Module, steps: int = 8) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(IDS), torch.tensor([0, 1, 2, 1]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def layers(model: nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def test_it_starts_as_the_base_and_only_the_adapter_learns(base: Reader) -> None:
    model = adapted(base)
    assert len(layers(model)) == 4
    with torch.no_grad():
        assert torch.equal(model(IDS), base(IDS))
    losses = train(model)
    assert losses[-1] < losses[0] / 2
    assert not torch.equal(model(IDS), base(IDS))
    held = get_base_model_state_dict(model)
    assert held.keys() == base.state_dict().keys()
    assert all(torch.equal(held[name], value) for name, value in base.state_dict().items())


def test_its_state_goes_into_a_fresh_one_by_either_library(base: Reader, tmp_path: Path) -> None:
    model = adapted(base)
    train(model)
    state = get_peft_model_state_dict(model)
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "adapter.safetensors")
    state = load_file(tmp_path / "adapter.safetensors")
    assert "parts.mix.lora_A.weight" in state and state["parts.mix.lora_A.weight"].shape == (3, 8)

    again = adapted(base)
    result = set_peft_model_state_dict(again, state)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(again(IDS), model(IDS))

    theirs = peft.inject_adapter_in_model(peft.LoraConfig(**OPTIONS), copy.deepcopy(base))
    assert peft.get_peft_model_state_dict(theirs).keys() == state.keys()
    assert not peft.set_peft_model_state_dict(theirs, state).unexpected_keys
    assert_close(theirs(IDS), model(IDS))
    back = peft.get_peft_model_state_dict(theirs)
    third = adapted(base, "other")
    set_peft_model_state_dict(third, back, "other")
    assert torch.equal(third(IDS), model(IDS))


def test_a_key_that_nothing_takes_is_accounted_for(base: Reader) -> None:
    model = adapted(base)
    state = {name: value + 1 for name, value in get_peft_model_state_dict(model).items()}
    state["parts.mox.lora_A.weight"] = state.pop("parts.mix.lora_A.weight")
    with pytest.warns(VeneerWarning, match=r"nothing in the model takes them:\s+parts\.mox\.lora_A"):
        result = set_peft_model_state_dict(model, state)
    assert result.unexpected_keys == ["parts.mox.lora_A.weight"]
    assert [key for key in result.missing_keys if "lora_" in key] == ["parts.mix.lora_A.weight"]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(LoadMismatchError):
        set_peft_model_state_dict(model, {"parts.mox.lora_A.weight": torch.ones(3, 8)})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_torchs_own_state_dict_holds_everything(base: Reader, tmp_path: Path) -> None:
    """A checkpoint of the whole model: saved and loaded by torch alone, with weights_only."""
    model = adapted(base)
    train(model)
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    again = adapted(Reader().eval())
    again.load_state_dict(torch.load(tmp_path / "whole.pt", weights_only=True))
    assert torch.equal(again(IDS), model(IDS))
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]


def test_it_merges_and_its_weights_become_a_plain_model(base: Reader, tmp_path: Path) -> None:
    model = adapted(base)
    train(model)
    wanted = model(IDS)
    for layer in layers(model):
        layer.merge()
    assert_close(model(IDS), wanted)
    for layer in layers(model):
        layer.unmerge()
    assert torch.equal(model(IDS), wanted)

    LoraConfig(**OPTIONS).save_pretrained(tmp_path)
    state = get_peft_model_state_dict(model)
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / SAFETENSORS_NAME)
    with pytest.warns(VeneerWarning, match=r"'base_model\.model\.' was put before"):
        whole = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(whole(IDS), wanted)
    merged = whole.merge_and_unload()
    assert type(merged) is Reader and not layers(merged)
    assert merged.state_dict().keys() == base.state_dict().keys()
    assert_close(merged(IDS), wanted)


def test_two_adapters_in_one_plain_model(base: Reader) -> None:
    options = {"r": 2, "lora_alpha": 6, "target_modules": ["gate", "mix"]}
    alone = {}
    for name in ("a", "b"):
        model = inject_adapter_in_model(LoraConfig(**options), copy.deepcopy(base), name)
        train(model, 4 if name == "a" else 7)
        alone[name] = (get_peft_model_state_dict(model, adapter_name=name), model(IDS))
    model = copy.deepcopy(base)
    for name, (state, _) in alone.items():
        inject_adapter_in_model(LoraConfig(**options), model, name)
        set_peft_model_state_dict(model, state, name)
    assert sorted(model.peft_config) == ["a", "b"]
    for name in ("a", "b", "a"):
        for layer in layers(model):
            layer.set_adapter(name)
        assert torch.equal(model(IDS), alone[name][1])
    assert not torch.equal(alone["a"][1], alone["b"][1])
    for layer in layers(model):
        layer.enable_adapters(False)
    assert torch.equal(model(IDS), base(IDS))
