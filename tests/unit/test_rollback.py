"""What was held is put back, the same objects with the same bits, whatever is raised."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from tests.laws.snapshots import Snapshot
from tests.storages import eight_bits, four_bits, torchao
from veneer.backends import find
from veneer.rollback import Rollback


def test_attributes_parameters_and_children_are_the_same_objects_again() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    before = Snapshot(model)
    with pytest.raises(KeyboardInterrupt), Rollback() as back:
        back.hold(model, model[0])
        model[0].weight = nn.Parameter(torch.zeros(1, 1))
        model[0].extra, model.training = 1, False
        model.add_module("2", nn.ReLU())
        raise KeyboardInterrupt
    before.assert_same(model)


def test_what_ends_well_is_forgotten() -> None:
    layer = nn.Linear(2, 3)
    with Rollback() as back:
        back.hold(layer)
        back.hold_values(find(layer), layer, "weight")
        layer.in_features = 7
        with torch.no_grad():
            layer.weight.zero_()
    assert layer.in_features == 7 and not layer.weight.any()


def test_one_takes_over_what_another_holds() -> None:
    layer = nn.Linear(2, 3)
    with pytest.raises(RuntimeError, match="later"), Rollback() as back:
        with Rollback() as own:
            own.hold(layer)
            layer.in_features = 7
            back.take_over(own)
        assert layer.in_features == 7
        raise RuntimeError("later")
    assert layer.in_features == 2


STORAGES = {
    "dense": lambda layer: layer,
    "bf16": lambda layer: layer.bfloat16(),
    "offloaded": lambda layer: cpu_offload(layer, execution_device="cpu"),
    "nf4": four_bits,
    "int8": eight_bits,
    "int8-dense": lambda layer: eight_bits(layer, has_fp16_weights=True),
    "torchao": torchao,
}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("called", [False, True])
def test_a_weight_and_a_bias_in_every_storage(storage: str, called: bool) -> None:
    torch.manual_seed(0)
    layer = STORAGES[storage](nn.Linear(64, 64).requires_grad_(False).eval())
    backend, dtype = find(layer), torch.bfloat16 if storage == "bf16" else torch.float32
    x = torch.randn(2, 64, dtype=dtype)
    if called:  # a forward of 8 bits takes codes and scales out of the parameter
        layer(x)
    weight, bias, expected = layer.weight, layer.bias, copy.deepcopy(layer)(x)
    values = backend.read(layer).clone()
    with pytest.raises(RuntimeError, match="half-way"), Rollback() as back:
        back.hold(layer)
        back.hold_values(backend, layer, "weight")
        back.hold_values(backend, layer, "bias")
        backend.write(layer, torch.ones(64, 64))
        backend.write(layer, torch.ones(64), "bias")
        assert not torch.equal(backend.read(layer), values)
        raise RuntimeError("half-way")
    assert layer.weight is weight and layer.bias is bias
    assert torch.equal(backend.read(layer), values) and torch.equal(layer(x), expected)


def test_a_weight_of_another_shape() -> None:
    layer = nn.Linear(2, 3)
    weight, values = layer.weight, layer.weight.detach().clone()
    with pytest.raises(RuntimeError), Rollback() as back:
        back.hold(layer)
        back.hold_values(find(layer), layer, "weight")
        find(layer).write(layer, torch.zeros(5, 5))
        raise RuntimeError
    assert layer.weight is weight and torch.equal(weight, values)
