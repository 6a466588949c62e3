"""Bare parameters whose values are elsewhere or in codes."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from tests.laws.cases import train
from tests.laws.special_models import SPECIAL
from tests.storages import torchao
from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.errors import TargetError


def adapted(base: nn.Module) -> PeftModel:
    options = {"target_modules": [], "target_parameters": ["experts.up", "experts.down", "last.table"]}
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=3, **options))
    train(model, "default")
    return model.eval()


def test_offloaded_ones_compute_what_those_in_memory_do() -> None:
    case = SPECIAL["parameters"]
    dense, x = case.build().eval().requires_grad_(False), case.x()
    offloaded = copy.deepcopy(dense)
    cpu_offload(offloaded.experts, execution_device="cpu")  # its `scale`, which nothing adapts, too
    cpu_offload(offloaded.last, execution_device="cpu")
    model, expected = adapted(offloaded), adapted(copy.deepcopy(dense))
    assert torch.equal(model(x), expected(x)) and not torch.equal(model(x), dense(x))
    with model.disable_adapter():
        assert torch.equal(model(x), dense(x))
    for twin in (model, expected):
        twin.zero_grad()
        twin.train()(x).square().sum().backward()
        twin.eval()
    for ours, theirs in zip(
        (p for p in model.parameters() if p.requires_grad),
        (p for p in expected.parameters() if p.requires_grad),
        strict=True,
    ):
        assert ours.grad is not None and torch.equal(ours.grad, theirs.grad)
    model.merge_adapter()
    expected.merge_adapter()
    assert torch.equal(model(x), expected(x))
    with model.disable_adapter():
        assert torch.equal(model(x), dense(x))
    assert all(p.is_meta for n, p in model.get_base_model().experts.named_parameters() if "lora_" not in n)


def test_codes_are_refused() -> None:
    model = nn.Sequential(torchao(nn.Linear(8, 8)))
    weight = model[0].weight
    with pytest.raises(TargetError, match="weight is quantised by torchao"):
        get_peft_model(model, LoraConfig(target_modules=[], target_parameters=["0.weight"]))
    assert type(model[0]) is nn.Linear and model[0].weight is weight
