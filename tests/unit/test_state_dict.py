"""A model with adapters <-> tensors under their names on disk."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.laws.cases import train
from tests.tolerances import assert_close
from veneer import (
    LoraConfig,
    PeftModel,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from veneer.errors import AdapterNameError, BaseMismatchError, LoadMismatchError, VeneerWarning
from veneer.layers import LoraLayer
from veneer.state_dict import set_adapter_state_dict, slots


class Net(nn.Module):
    """A table, a linear and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.linear = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(self.embed(x)))


NAMES = {
    "embed.lora_embedding_A": (2, 7),
    "embed.lora_embedding_B": (4, 2),
    "linear.lora_A.weight": (2, 4),
    "linear.lora_B.weight": (3, 2),
    "linear.lora_B.bias": (3,),
    "norm.weight": (3,),
    "norm.bias": (3,),
}


def config(*targets: str, **more: object) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=6, target_modules=list(targets), **more)


def made(name: str = "default") -> PeftModel:
    model = get_peft_model(Net(), config("linear", lora_bias=True, modules_to_save=["norm"]), name)
    model.add_adapter("table", config("embed"))
    return model


@pytest.mark.parametrize("name", ["default", "weight", "lora_A", "a b"])
def test_names_on_disk_do_not_hold_the_adapters_name(name: str) -> None:
    model = made(name)
    found = {
        **get_peft_model_state_dict(model, adapter_name=name),
        **get_peft_model_state_dict(model, adapter_name="table"),
    }
    assert {k: tuple(v.shape) for k, v in found.items()} == {
        f"base_model.model.{k}": shape for k, shape in NAMES.items()
    }


def test_an_injected_module_has_the_same_names_without_prefix() -> None:
    model = inject_adapter_in_model(config("linear"), Net())
    assert set(get_peft_model_state_dict(model)) == {"linear.lora_A.weight", "linear.lora_B.weight"}


def test_only_the_adapters_tensors_are_collected() -> None:
    model = made()
    state = get_peft_model_state_dict(model)
    own = {p.data_ptr() for p in model.parameters() if p.requires_grad}
    assert {t.data_ptr() for t in state.values()} == own


def test_a_compiled_model_has_the_same_names() -> None:
    model = made()
    assert get_peft_model_state_dict(torch.compile(model)).keys() == get_peft_model_state_dict(model).keys()
    model.base_model.model.linear = torch.compile(model.base_model.model.linear)
    assert "base_model.model.linear.lora_A.weight" in {s.disk for s in slots(model, "default")}


@pytest.mark.parametrize("inside", [False, True])
def test_a_compiled_model_takes_an_adapter_and_its_tensors(inside: bool) -> None:
    """Injected into a compiled model, or by a PeftModel around it."""
    plain, x = Net(), torch.arange(4)
    compiled = torch.compile(copy.deepcopy(plain), backend="eager")
    before = compiled(x)
    config_ = LoraConfig(r=2, target_modules=["linear"])
    if inside:
        model, reference = get_peft_model(compiled, config_), get_peft_model(plain, config_)
    else:
        model, reference = (inject_adapter_in_model(config_, m) for m in (compiled, plain))
    assert inside or model is compiled
    assert torch.equal(model(x), before)
    tensors = {k: torch.full_like(v, 0.3) for k, v in get_peft_model_state_dict(reference).items()}
    assert get_peft_model_state_dict(model).keys() == tensors.keys()
    for each in (model, reference):
        assert set_peft_model_state_dict(each, tensors) == ([], [])
    assert_close(model(x), reference(x))
    assert not torch.equal(model(x), before)
    base = get_base_model_state_dict(reference)
    assert get_base_model_state_dict(model).keys() == base.keys()


def test_values_of_a_given_state_dict_with_or_without_prefix() -> None:
    model = made()
    full = {k: torch.full_like(v, 7.0) for k, v in model.state_dict().items()}
    inner = {k.removeprefix("base_model.model."): v for k, v in full.items()}
    for given in (full, inner, get_peft_model_state_dict(model, state_dict=full)):
        taken = get_peft_model_state_dict(model, state_dict=given)
        assert taken.keys() == get_peft_model_state_dict(model).keys()
        assert all(bool((v == 7.0).all()) for v in taken.values())
    del full["base_model.model.linear.lora_A.default.weight"]
    with pytest.raises(LoadMismatchError, match=r"linear\.lora_A\.default\.weight.*all shards"):
        get_peft_model_state_dict(model, state_dict=full)


def test_unknown_adapters_are_named() -> None:
    with pytest.raises(AdapterNameError, match="'default', 'table'"):
        get_peft_model_state_dict(made(), adapter_name="x")


def test_nothing_is_written_unless_everything_fits() -> None:
    model = made()
    state = {k: torch.randn_like(v) for k, v in get_peft_model_state_dict(model).items()}
    before = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    with pytest.raises(LoadMismatchError):
        set_adapter_state_dict(model, {**state, "base_model.model.norm.bias": torch.ones(9)}, "default")
    assert all(torch.equal(v, before[k]) for k, v in get_peft_model_state_dict(model).items())
    report = set_adapter_state_dict(
        model, {**state, "base_model.model.norm.bias": torch.ones(9)}, "default", ignore_mismatched_sizes=True
    )
    assert len(report.mismatched) == 1
    after = get_peft_model_state_dict(model)
    assert torch.equal(after["base_model.model.norm.bias"], before["base_model.model.norm.bias"])
    assert all(torch.equal(after[k], v) for k, v in state.items() if k != "base_model.model.norm.bias")


def test_factors_without_values_get_them() -> None:
    source = made()
    train(source, "default")
    model = inject_adapter_in_model(
        config("linear", lora_bias=True, modules_to_save=["norm"]), Net(), low_cpu_mem_usage=True
    )
    state = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(source).items()}
    assert set_adapter_state_dict(model, state, "default").ok
    assert not any(p.is_meta for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in get_peft_model_state_dict(model).items())
    assert all(p.requires_grad for p in model.linear.adapter_parameters("default"))


def test_only_what_is_saved_is_had_back_from_under_a_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(Net(), config("linear", "embed"))
    train(model, "default")
    model.merge_adapter()
    asked: list[LoraLayer] = []
    original = LoraLayer.original_base
    monkeypatch.setattr(LoraLayer, "original_base", lambda self: asked.append(self) or original(self))
    get_peft_model_state_dict(model)
    assert not asked


def test_an_embedding_with_merged_rows_is_saved_as_it_was_before() -> None:
    model = get_peft_model(
        WithEmbedding(), LoraConfig(r=2, target_modules=["linear"], trainable_token_indices=[2])
    )
    name = "base_model.model.embed.token_adapter.base_layer.weight"
    before = get_peft_model_state_dict(model, save_embedding_layers=True)[name].clone()
    with torch.no_grad():
        model.base_model.model.embed.rows("default").add_(1.0)
    model.merge_adapter()
    assert torch.equal(get_peft_model_state_dict(model, save_embedding_layers=True)[name], before)
    full = model.state_dict()
    saved = get_peft_model_state_dict(model, state_dict=full, save_embedding_layers=True)
    assert torch.equal(saved[name], before)


def test_what_a_file_would_replace_is_said_only_where_it_is_loaded(tmp_path: Path) -> None:
    saved = get_peft_model(WithEmbedding(), config("linear"))
    saved.save_pretrained(tmp_path, save_embedding_layers=True)
    torch.manual_seed(1)
    with pytest.raises(BaseMismatchError):  # without a warning, which would be an error here
        PeftModel.from_pretrained(WithEmbedding(), tmp_path)
    with pytest.warns(VeneerWarning, match="carries its own embed.weight"):
        PeftModel.from_pretrained(WithEmbedding(), tmp_path, check_base=False)


class WithEmbedding(Net):
    """One that says where its embedding is."""

    def get_input_embeddings(self) -> nn.Module:
        return self.embed


def test_biases_that_the_adapter_does_not_train_are_named_and_not_written() -> None:
    donor = get_peft_model(Net(), config("linear", bias="all"))
    tensors = {k: torch.randn_like(v) for k, v in get_peft_model_state_dict(donor).items()}
    model = get_peft_model(Net(), config("linear", bias="none"))
    bias = model.base_model.model.linear.base_layer.bias
    before = bias.clone()
    with pytest.warns(VeneerWarning, match=r"linear\.base_layer\.bias"):
        result = set_peft_model_state_dict(model, tensors)
    assert sorted(result.unexpected_keys) == sorted(k for k in tensors if "lora" not in k)
    assert torch.equal(bias, before)
