"""Which modules may lay the tokens of all rows in one axis, and what a mixed call leaves of them."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.errors import RoutingError


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(2, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.stack[0]


class Layer(nn.Module):
    """With its experts beside its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.router, self.experts = nn.Linear(4, 4), nn.Linear(4, 4), Experts()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.self_attn(x).flatten(0, 1)
        return self.experts(self.router(tokens)).view_as(x)  # type: ignore[no-any-return]


def adapted(modules: list[str], parameters: list[str]) -> PeftModel:
    net = nn.Sequential(Layer(), nn.Linear(4, 4))
    options = {"target_modules": modules, "target_parameters": parameters, "init_lora_weights": False}
    return get_peft_model(net, LoraConfig(r=2, **options))


@pytest.mark.parametrize(
    ("modules", "parameters", "found"),
    [
        (["self_attn", "1"], [], []),
        (["router"], [], ["0"]),
        ([], ["experts.stack"], ["0"]),
        ([], ["router.weight"], ["0"]),
        ([], ["1.weight"], [""]),
    ],
)
def test_those_whose_flat_tokens_reach_an_adapter(
    modules: list[str], parameters: list[str], found: list[str]
) -> None:
    model = adapted(modules, parameters)
    base = model.get_base_model()
    assert model.base_model.flattening == [base.get_submodule(path) for path in found]


def test_a_copy_has_its_own_and_a_call_leaves_nothing() -> None:
    model = adapted(["router"], ["experts.stack"])
    twin = copy.deepcopy(model)
    x, names = torch.randn(2, 3, 4), ["default", "__base__"]
    layer = twin.get_base_model()[0]
    layer.forward = own = partial(Layer.forward, layer)  # as offloading has it
    assert twin.base_model.flattening == [layer]
    assert torch.equal(model(x, adapter_names=names), twin(x, adapter_names=names))
    with pytest.raises(RoutingError):
        twin(x, adapter_names=["default"] * 3 + ["__base__"])
    assert layer.forward is own and "forward" not in model.get_base_model()[0].__dict__
