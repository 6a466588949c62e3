"""Rows of one batch through different adapters: the same as each adapter by itself, for every layer."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from tests.laws.cases import ALL, Combination, acting_everywhere, train
from veneer.layers import LoraLayer, wrap
from veneer.routing import BASE, Activation, routed
from veneer.testing.laws import close

#: Cases whose first axis is that of the batch, each with more than one row.
BATCHED = [
    p
    for p in ALL
    if p.values[0].init == "Default"
    and p.values[0].dtype in (torch.float32, torch.bfloat16)
    and p.values[0].case.name not in ("0-D", "1-D", "unbatched", "empty")
]
each = pytest.mark.parametrize("made", BATCHED)


def layer_with_three(made: Combination) -> LoraLayer:
    layer = made.layer()
    for seed, name in enumerate(("second", "third"), start=6):
        wrap(layer, made.config(**{"r": 2 * seed - 6} if "r" not in made.case.options else {}), name)
        train(layer, name, seed)
    return layer


def mixed(layer: LoraLayer, names: list[str]) -> AbstractContextManager[object]:
    """A call whose rows go through these adapters; one that is invoked by a text is invoked everywhere."""
    return routed(layer, names, activation=Activation({}))


def rows_by_themselves(layer: LoraLayer, names: list[str], x: Tensor) -> Tensor:
    """Each row through its own adapter, as the whole batch went through that one."""
    whole = {}
    for name in dict.fromkeys(names):
        layer.enable_adapters(name != BASE)
        layer.set_adapter(name)
        with acting_everywhere():
            whole[name] = layer(x)
    layer.enable_adapters(True)
    return torch.stack([whole[name][row] for row, name in enumerate(names)])


def names_for(x: Tensor) -> list[str]:
    return [("default", BASE, "second", "third")[row % 4] for row in range(x.shape[0])]


@each
def test_each_row_is_what_its_adapter_gives(made: Combination) -> None:
    layer, x = layer_with_three(made), made.x()
    names = names_for(x)
    expected = rows_by_themselves(layer, names, x)
    with mixed(layer, names), torch.no_grad():
        close(layer(x), expected, made)
    with mixed(layer, names):
        close(layer(x), expected, made)


#: What scales gradients by how often a row is looked up counts the rows of one adapter, not of the batch.
DIFFERENTIABLE = [p for p in BATCHED if p.values[0].case.name != "by-frequency"]


@pytest.mark.parametrize("made", DIFFERENTIABLE)
def test_gradients_are_those_of_the_rows(made: Combination) -> None:
    layer, x = layer_with_three(made), made.x()
    if x.is_floating_point():
        x.requires_grad_()
    names = names_for(x)
    for name in layer.held_adapters:
        for parameter in layer.adapter_parameters(name):
            parameter.requires_grad_(True)
    leaves = [p for p in layer.parameters() if p.requires_grad] + ([x] if x.requires_grad else [])

    def gradients(output: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(output.float().square().sum(), leaves, allow_unused=True)
        dense = [
            torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(leaves, found, strict=True)
        ]
        return dense

    with mixed(layer, names):
        actual = gradients(layer(x))
    layer.train(layer.training)
    by_row = rows_by_themselves_with_grad(layer, names, x)
    for mine, expected in zip(actual, gradients(by_row), strict=True):
        close(mine, expected, made)


def rows_by_themselves_with_grad(layer: LoraLayer, names: list[str], x: Tensor) -> Tensor:
    whole = {}
    for name in dict.fromkeys(names):
        if name == BASE:
            whole[name] = layer.original_base()(x)
        else:
            layer._live = (name,)
            with acting_everywhere():
                whole[name] = layer(x)
    return torch.stack([whole[name][row] for row, name in enumerate(names)])
