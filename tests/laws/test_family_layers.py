"""The rows of several adapters in one training step, for every layer type, variant and initialisation.

Each adapter gets the gradients that it gets alone, and nothing of another reaches it. The step multiplies
with the base as often, and keeps as much for the backward, as that of one adapter with the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.laws.cases import ALL, Combination, train
from tests.laws.test_mixed_batch import bits
from veneer.layers import LoraLayer, wrap
from veneer.ops.dropout import Draws
from veneer.routing import routed
from veneer.variants import dora
from veneer.variants.alora import Activation

NAMES = ("default", "second", "third")
UNBATCHED = ("0-D", "1-D", "unbatched", "empty")
#: Every case in float32, in any storage and with any initialisation and variant.
EACH = [p for p in ALL if p.values[0].dtype == torch.float32 and p.values[0].case.name not in UNBATCHED]


def layer_of(made: Combination, p: float) -> LoraLayer:
    """Three adapters of different ranks, with factors as training might leave them, in training."""
    layer = made.layer(lora_dropout=p)
    for seed, name in enumerate(NAMES[1:], start=6):
        config = made.config(lora_dropout=p, **{} if "r" in made.case.options else {"r": 2 * seed - 6})
        made.measure(layer, config.r)
        wrap(layer, config, name)
        train(layer, name, seed)
    for name in NAMES:
        for parameter in layer.adapter_parameters(name):
            parameter.requires_grad_(True)
    layer.lora_dropout.train()
    return layer


def input_of(made: Combination, times: int) -> Tensor:
    x = made.x()
    return torch.cat([x] * times).clone()


def step(layer: LoraLayer, names: Sequence[str], x: Tensor) -> Tensor:
    draws = {name: Draws(torch.Generator().manual_seed(i), 1, 1) for i, name in enumerate(NAMES)}
    with routed(layer, names, activation=Activation({}), draws=draws):
        return layer(x)


def gradients(layer: LoraLayer, owners: Sequence[str], x: Tensor, outward: Tensor) -> dict[str, list[Tensor]]:
    """Outputs and gradients, of the input too, by adapter."""
    x = x.clone().requires_grad_(x.is_floating_point())
    y = step(layer, owners, x)
    names = list(dict.fromkeys(owners))
    own = {name: list(layer.adapter_parameters(name)) for name in names}
    leaves = [p for name in names for p in own[name]] + ([x] if x.requires_grad else [])
    found = list(torch.autograd.grad(y, leaves, outward, allow_unused=True))
    found = [torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(leaves, found, strict=True)]
    result = {}
    for name in names:
        rows = [row for row, owner in enumerate(owners) if owner == name]
        result[name] = [y.detach()[rows], *(found.pop(0) for _ in own[name])]
        if x.requires_grad:
            result[name].append(found[-1][rows])
    return result


def outward_of(layer: LoraLayer, owners: Sequence[str], x: Tensor) -> Tensor:
    with torch.no_grad():
        y = step(layer, owners, x)
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)


@pytest.mark.parametrize("made", EACH)
def test_each_gets_what_it_gets_alone_and_nothing_of_another(made: Combination) -> None:
    for p in (0.0, 0.25):
        layer, x = layer_of(made, p), input_of(made, len(NAMES))
        owners = [name for name in NAMES for _ in range(x.shape[0] // len(NAMES))]
        outward = outward_of(layer, owners, x)
        together = gradients(layer, owners, x, outward)
        for name in NAMES:
            rows = [row for row, owner in enumerate(owners) if owner == name]
            alone = gradients(layer, [name] * len(rows), x[rows], outward[rows])[name]
            for mine, theirs in zip(together[name], alone, strict=True):
                assert (mine - theirs).norm() <= 1e-5 * max(float(theirs.norm()), 1e-3), (name, p)
        with torch.no_grad():
            for parameter in layer.adapter_parameters("second"):
                parameter.fill_(torch.nan)
        spoilt = [owner == "second" for owner in owners]
        outward[torch.tensor(spoilt)] = torch.nan
        if x.is_floating_point():
            x[torch.tensor(spoilt)] = torch.inf
        changed = gradients(layer, owners, x, outward)
        for name in ("default", "third"):
            for mine, right in zip(changed[name], together[name], strict=True):
                assert torch.equal(bits(mine), bits(right)), (name, p)


class Counted(TorchDispatchMode):
    """Counts operations that compute with a tensor, and new tensors of all rows, as large as the output."""

    LOOKS = ("detach", "view", "t", "transpose", "alias", "expand", "as_strided", "unsafe_view")

    def __init__(self, tensor: Tensor, output: Tensor) -> None:
        super().__init__()
        self.place, self.products = tensor.untyped_storage().data_ptr(), 0
        self.rows, self.size, self.large = len(output), output.numel(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        name = func._schema.name.removeprefix("aten::").lstrip("_").partition("_with")[0]
        places = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        result = func(*args, **(kwargs or {}))
        if name not in self.LOOKS:
            self.products += self.place in places
        if isinstance(result, Tensor) and result.numel() >= self.size and not len(result) % self.rows:
            self.large += result.untyped_storage().data_ptr() not in places
        return result


def cost(layer: LoraLayer, owners: Sequence[str], x: Tensor, outward: Tensor) -> tuple[int, int, int, int]:
    """How often a step computes with the base's weight, forwards and backwards; new tensors; bytes kept.

    Of these, without the positions of dropout, whose number is random.
    """
    weight = getattr(layer.base_layer, layer.weight_name)
    x = x.clone().requires_grad_(x.is_floating_point())
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        Counted(weight, outward) as forward,
    ):
        y = step(layer, owners, x)
    with Counted(weight, outward) as backward:
        y.backward(outward)
    return forward.products, backward.products, forward.large, sum(kept.values())


#: Every case and variant: where factors started makes no step dearer.
PRICED = [p for p in EACH if (p.values[0].init, p.values[0].backend) == ("Default", "dense")]


@pytest.mark.parametrize("made", PRICED)
def test_a_step_costs_the_base_no_more_than_that_of_one_adapter(
    made: Combination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept is counted by row: that of the size of factors is each adapter's own."""

    def norms(self: dora.Dora, layer: LoraLayer, name: str, grad: bool) -> Tensor:
        return layer.extra(name)[dora.MAGNITUDE].detach().flatten()

    # They are computed from the weight for each adapter, whatever the rows.
    monkeypatch.setattr(dora.Dora, "_norms", norms)
    for p in (0.0, 0.25):
        layer = layer_of(made, p)
        counts, large, kept = {}, {}, {}
        for times in (1, 16):
            x = input_of(made, times * len(NAMES))
            apart = [name for name in NAMES for _ in range(x.shape[0] // len(NAMES))]
            for owners in (apart, ["default"] * len(apart), ["third"] * len(apart)):
                key = ("apart" if owners is apart else owners[0], times)
                forward, backward, large[key], kept[key] = cost(
                    layer, owners, x, outward_of(layer, owners, x)
                )
                counts[key] = forward, backward
        assert len(set(counts.values())) == 1, (p, counts)
        assert large["apart", 16] <= large["default", 16], (p, large)
        for_rows = {key: kept[key, 16] - kept[key, 1] for key, _ in kept}
        assert for_rows["apart"] <= max(for_rows["default"], for_rows["third"]), (p, for_rows)
