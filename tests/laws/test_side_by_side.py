"""Adapters that meet in one model: what one does never silently undoes the other's work."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from veneer import (
    AdapterNameError,
    ConfigError,
    LoraConfig,
    MergeError,
    PeftModel,
    TargetError,
    get_model_status,
    get_peft_model,
    set_peft_model_state_dict,
)
from veneer.state_dict import get_peft_model_state_dict


class Net(nn.Module):
    """An embedding, a body and a head, with transformers' way to ask for the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.emb = nn.Embedding(12, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)

    def get_input_embeddings(self) -> nn.Module:
        """Where the embedding is, also while it is adapted."""
        return self.emb

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (...) -> (..., 3)."""
        return self.head(self.body(self.emb(ids)))  # type: ignore[no-any-return]


IDS = torch.arange(12).view(3, 4)


def config(*targets: str, **options: object) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=6, target_modules=list(targets), init_lora_weights=False, **options)


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_second_adapter_leaves_the_first_ones_biases_trainable() -> None:
    model = get_peft_model(Net(), config("body.0", bias="all"))
    before = trainable(model)
    model.add_adapter("b", config("body.2"))
    assert {n.replace("base_layer.", "") for n in trainable(model)} == {
        n.replace("base_layer.", "") for n in before
    }


def test_a_file_with_embeddings_never_overwrites_a_merged_one(tmp_path: Path) -> None:
    other = Net()
    with torch.no_grad():
        other.emb.weight.mul_(2)
    get_peft_model(other, config("emb")).save_pretrained(tmp_path)
    model = get_peft_model(Net(), config("emb"))
    expected = model(IDS)
    model.merge_adapter()
    with pytest.raises(MergeError, match="unmerge_adapter"):
        model.load_adapter(tmp_path, "b", check_base=False)
    assert list(model.peft_config) == ["default"]
    model.unmerge_adapter()
    assert torch.equal(model(IDS), expected)


def test_a_file_with_the_same_embeddings_loads_beside_a_merged_one(tmp_path: Path) -> None:
    get_peft_model(Net(), config("emb")).save_pretrained(tmp_path)
    model = get_peft_model(Net(), config("emb"))
    model.merge_adapter()
    merged = model(IDS)
    model.load_adapter(tmp_path, "b")
    assert torch.equal(model(IDS), merged)


def test_a_state_dict_with_embeddings_never_overwrites_merged_ones() -> None:
    model = get_peft_model(Net(), config("emb"))
    model.add_adapter("b", config("body.0"))
    tensors = get_peft_model_state_dict(model, adapter_name="b", save_embedding_layers=True)
    tensors["base_model.model.emb.base_layer.weight"] = torch.ones(12, 8)
    model.merge_adapter(["default"])
    merged, weight = model(IDS), model.get_base_model().emb.base_layer.weight.clone()
    with pytest.raises(MergeError, match=r"another adapter is merged into .*emb"):
        set_peft_model_state_dict(model, tensors, adapter_name="b")
    assert torch.equal(model(IDS), merged)
    assert torch.equal(model.get_base_model().emb.base_layer.weight, weight)


def test_biases_are_not_trained_over_a_merged_one() -> None:
    model = get_peft_model(Net(), config("body.0", lora_bias=True))
    model.merge_adapter()
    with pytest.raises(MergeError, match="lora_bias merged"):
        model.add_adapter("b", config("body.0", bias="lora_only"))


def test_a_refused_merge_leaves_nothing_that_undoes_later_training() -> None:
    model = get_peft_model(Net(), config("body.0"))
    model.add_adapter("b", config("body.0", lora_bias=True))
    model.merge_adapter(["default"])
    layer = model.get_base_model().body[0]
    with torch.no_grad():
        layer.lora_A["b"].weight.fill_(float("nan"))
    with pytest.raises(MergeError):
        model.merge_adapter(["b"], safe_merge=True)
    with torch.no_grad():
        layer.base_layer.bias.add_(1)
    trained = layer.base_layer.bias.detach().clone()
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.bias, trained)


@pytest.mark.parametrize("whole", ["body", "body.0"])
def test_an_adapted_module_is_not_trained_whole(whole: str) -> None:
    model = get_peft_model(Net(), config("body.0"))
    with pytest.raises(TargetError, match="'default' adapts it"):
        model.add_adapter("b", config("head", modules_to_save=[whole]))
    assert list(model.peft_config) == ["default"]


def test_a_module_trained_whole_is_not_adapted() -> None:
    model = get_peft_model(Net(), config("body.0", modules_to_save=["head"]))
    with pytest.raises(TargetError, match="'default' trains it whole"):
        model.add_adapter("b", config("head"))


def test_unloading_two_copies_of_a_head_changes_nothing() -> None:
    model = get_peft_model(Net(), config("body.0", modules_to_save=["head"]))
    model.add_adapter("b", config("body.2", modules_to_save=["head"]))
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(MergeError, match="one of them can be active"):
        model.merge_and_unload(adapter_names=["default", "b"])
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    with pytest.raises(AdapterNameError):
        model.set_adapter(["default", "b"])


def test_an_adapter_that_comes_while_the_others_are_disabled_works_afterwards(tmp_path: Path) -> None:
    get_peft_model(Net(), config("body.2")).save_pretrained(tmp_path)
    model = get_peft_model(Net(), config("body.0"))
    with model.disable_adapter():
        model.load_adapter(tmp_path, "b")
    model.set_adapter("b")
    expected = PeftModel.from_pretrained(Net(), tmp_path)(IDS)
    torch.testing.assert_close(model(IDS), expected)
    assert get_model_status(model).active_adapters == ["b"]


def test_nothing_is_loaded_into_a_merged_adapter() -> None:
    model = get_peft_model(Net(), config("body.0"))
    tensors = copy.deepcopy(get_peft_model_state_dict(model))
    model.merge_adapter()
    with pytest.raises(MergeError, match="unmerge_adapter"):
        set_peft_model_state_dict(model, tensors)


def test_a_given_state_dict_does_not_carry_merged_embeddings(tmp_path: Path) -> None:
    model = get_peft_model(Net(), config("emb"))
    expected = model(IDS)
    model.merge_adapter()
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    torch.testing.assert_close(PeftModel.from_pretrained(Net(), tmp_path)(IDS), expected)


@pytest.mark.parametrize("strength", ["x", float("nan"), True, None])
def test_a_strength_that_is_no_number_changes_nothing(strength: object) -> None:
    model = get_peft_model(Net(), config("body.0"))
    model.add_adapter("b", config("body.2"))
    with pytest.raises(ConfigError, match="finite number"):
        model.set_adapter({"b": 0.5, "default": strength})
    assert model.active_adapters == ["default"]
    assert model.get_base_model().body[2].scaling["b"] == 3.0


def test_merging_no_adapter_at_all_is_said() -> None:
    model = get_peft_model(Net(), config("body.0"))
    model.set_adapter([])
    with pytest.raises(MergeError, match="no adapter is active"):
        model.merge_and_unload()
