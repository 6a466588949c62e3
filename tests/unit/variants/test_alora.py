"""Where an aLoRA does not act, nothing reaches it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.laws.cases import train
from tests.tolerances import assert_close
from veneer import LoraConfig
from veneer.layers import LoraLayer, wrap
from veneer.routing import BASE, routed
from veneer.variants.alora import Activation


def layer_with(*names: str) -> LoraLayer:
    torch.manual_seed(0)
    layer: nn.Module = nn.Linear(6, 5)
    for seed, name in enumerate(names):
        config = LoraConfig(r=2, lora_alpha=3, alora_invocation_tokens=[1])
        layer = wrap(layer, config, name)
        train(layer, name, seed)
    assert isinstance(layer, LoraLayer)
    return layer


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_comes_before_the_invocation_changes_no_gradient(value: float) -> None:
    layer, x = layer_with("default"), torch.randn(2, 4, 6)
    spoilt = x.clone()
    spoilt[0, :2] = value
    spoilt[1] = value  # not invoked at all
    own = list(layer.adapter_parameters("default"))
    for parameter in own:
        parameter.requires_grad_(True)

    def gradients(x: Tensor) -> tuple[Tensor, ...]:
        with routed(layer, [], activation=Activation({"default": [2, None]}, 4)):
            y = layer(x)
        return torch.autograd.grad(y, own, torch.linspace(-1, 1, y.numel()).view_as(y))

    for actual, expected in zip(gradients(spoilt), gradients(x), strict=True):
        assert torch.equal(actual, expected) and expected.any()


def test_it_acts_from_its_invocation_on() -> None:
    layer, x = layer_with("default"), torch.randn(2, 4, 6)
    with torch.no_grad(), routed(layer, [], activation=Activation({"default": [3, None]}, 4)):
        changed = (layer(x) != layer.original_base()(x)).any(-1)
    assert changed.tolist() == [[False, True, True, True], [False] * 4]


@pytest.mark.parametrize("expand", [1, 2])
def test_compiled_rows_of_several_are_those_of_the_plain_layer(expand: int) -> None:
    layer, names = layer_with("a", "b"), ["a", BASE, "b", "a"]
    x = torch.randn(4 * expand, 5, 6)
    activation = Activation({"a": [2, 3, 4, None], "b": [1, 1, 3, 2]}, 5)
    with torch.no_grad(), routed(layer, names, expand, activation):
        expected = layer(x)
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert_close(compiled(x), expected)
    base = layer.original_base()(x)
    changed = (expected != base).any(-1).any(-1)
    assert changed.tolist() == [row for row in (True, False, True, False) for _ in range(expand)]
