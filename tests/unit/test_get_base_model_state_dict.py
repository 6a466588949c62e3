"""The base's own tensors, in and out of an adapted model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.laws.cases import train
from veneer import (
    CheckpointError,
    LoadMismatchError,
    LoraConfig,
    MergeError,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from veneer.inject.base_tensors import differs_from_base


def base() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net.append(net[0])  # one module in two places
    return net


def adapted() -> nn.Module:
    config = LoraConfig(r=2, target_modules=["0", "1"], modules_to_save=["3"])
    model = get_peft_model(base(), config)
    train(model, "default")
    return model


def same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_the_base_comes_out_under_its_own_names_merged_or_not() -> None:
    model = adapted()
    expected = base().state_dict()
    same(get_base_model_state_dict(model), expected)
    model.merge_adapter()
    same(get_base_model_state_dict(model), expected)


def test_another_base_goes_in_and_the_adapter_stays() -> None:
    model, other = adapted(), base()
    for tensor in other.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(1)
    factors = {n: p.clone() for n, p in model.named_parameters() if "default" in n}
    assert set_base_model_state_dict(model, other.state_dict()) == ([], [])
    same(get_base_model_state_dict(model), other.state_dict())
    assert all(torch.equal(p, factors[n]) for n, p in model.named_parameters() if n in factors)


def test_what_does_not_fit_is_refused_and_nothing_is_written() -> None:
    model = adapted()
    before = copy.deepcopy(model.state_dict())
    given = {name: tensor + 1 for name, tensor in base().state_dict().items()}
    lacking = {**given, "9.weight": torch.ones(1)}
    del lacking["2.bias"]
    with pytest.raises(LoadMismatchError, match=r"2\.bias is missing; 9\.weight is unexpected"):
        set_base_model_state_dict(model, lacking)
    with pytest.raises(LoadMismatchError, match=r"0\.weight is \(5, 4\), here \(4, 4\)"):
        set_base_model_state_dict(model, {**given, "0.weight": torch.ones(5, 4)}, strict=False)
    for odd, kind in ((3, "int"), ({**given, "0.weight": [1.0]}, "list")):
        with pytest.raises(
            CheckpointError, match=f"state_dict: a mapping of names to tensors is needed, got {kind}"
        ):
            set_base_model_state_dict(model, odd)  # type: ignore[arg-type]
    same(model.state_dict(), before)
    assert set_base_model_state_dict(model, lacking, strict=False) == (["2.bias"], ["9.weight"])
    model.merge_adapter()
    with pytest.raises(MergeError, match=r"merged into .*: unmerge_adapter\(\) first"):
        set_base_model_state_dict(model, given)


def test_an_embedding_with_trained_tokens_is_the_base_s_own_merged_or_not() -> None:
    def small() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4))

    config = LoraConfig(r=2, target_modules=["1"], trainable_token_indices={"0": [1, 2]})
    model, expected = get_peft_model(small(), config), small().state_dict()
    with torch.no_grad():
        model.base_model.model[0].rows("default").add_(1)
    same(get_base_model_state_dict(model), expected)
    saved = get_peft_model_state_dict(model)
    layer = model.base_model.model[0]
    layer.merge()
    same(get_base_model_state_dict(model), expected)
    with pytest.raises(MergeError, match=r"merged into 0: unmerge_adapter\(\) first"):
        set_base_model_state_dict(model, expected)
    with pytest.raises(MergeError, match=r"'default' is merged \(into 0\): unmerge_adapter\(\)"):
        set_peft_model_state_dict(model, saved)
    assert not differs_from_base(model.get_base_model(), "0.weight", expected["0.weight"])
    layer.unmerge()
    other = {name: tensor + 1 for name, tensor in expected.items()}
    assert set_base_model_state_dict(model, other) == ([], [])
    same(get_base_model_state_dict(model), other)
