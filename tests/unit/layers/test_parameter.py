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
from veneer.errors import RoutingError, TargetError
from veneer.routing import routed


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


def test_a_mixed_batch_is_refused_by_name_before_anything_runs() -> None:
    case = SPECIAL["parameters"]
    model, ran = adapted(case.build()), []
    model.add_adapter("rows", LoraConfig(r=2, target_modules=["head"]))
    handle = model.get_base_model().embed.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(RoutingError) as refused:
        model(case.x(), adapter_names=["default", "rows", "__base__", "rows", "default"])
    handle.remove()
    assert not ran
    message = str(refused.value)
    assert "'default'" in message and "'rows'" not in message
    assert all(name in message for name in ("experts.up", "experts.down", "last.table"))


def test_rows_that_need_no_bare_parameter_are_served() -> None:
    case = SPECIAL["weight-of-a-linear"]
    base = nn.Sequential(case.build().head, nn.Linear(3, 4)).eval().requires_grad_(False)
    x = torch.randn(3, 8)
    plain = base(x)
    model = get_peft_model(base, LoraConfig(target_modules=[], target_parameters=["0.weight"]), "whole")
    model.add_adapter("rows", LoraConfig(r=2, target_modules=["1"]))
    for name in ("whole", "rows"):
        train(model, name)
    mixed = model(x, adapter_names=["rows", "__base__", "rows"])
    model.set_adapter("rows", inference_mode=True)
    torch.testing.assert_close(mixed[::2], model(x)[::2])
    assert torch.equal(mixed[1], plain[1])


def test_layers_that_are_called_by_themselves_refuse_rows_too() -> None:
    experts = adapted(SPECIAL["parameters"].build()).get_base_model().experts
    x, chosen = torch.randn(2, 8), torch.tensor([0, 1])
    with (
        routed(experts, ["default", "default"]),
        pytest.raises(RoutingError, match=r"experts\.down is a bare parameter"),
    ):
        experts(x, chosen)
    with routed(experts, ["__base__", "__base__"]):
        assert torch.equal(experts(x, chosen), experts.get_base_layer()(x, chosen))
