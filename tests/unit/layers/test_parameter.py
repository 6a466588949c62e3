"""Bare parameters whose values are elsewhere or in codes."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

from tests.laws.cases import train
from tests.laws.special_models import SPECIAL
from tests.storages import torchao
from tests.tolerances import BY_DTYPE, assert_close
from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.errors import RoutingError, TargetError


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


def test_tokens_that_a_model_packs_together_are_followed() -> None:
    """`tests/laws/test_experts.py` has that of transformers' mixtures."""
    case = SPECIAL["parameters"]
    model, names = adapted(case.build()), ["default", "default", "__base__", "__base__", "default"]
    mixed = model(case.x(), adapter_names=names).view(5, 3, -1)
    own = [0, 1, 4]
    assert_close(mixed[own].flatten(0, 1), model(case.x()[own]), BY_DTYPE[torch.float32])
    with model.disable_adapter():
        assert_close(mixed[2:4].flatten(0, 1), model(case.x()[2:4]), BY_DTYPE[torch.float32])


class Sorted(nn.Module):
    """Experts that get their tokens side by side, and how many each has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4, 4))

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        return torch.cat([part @ one for part, one in zip(x.split(sizes), self.weight, strict=True)])


class Packing(nn.Module):
    def __init__(self, *, sort: bool) -> None:
        super().__init__()
        self.experts, self.sort = Sorted(), sort

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        tokens = tokens[tokens[:, 0].argsort()] if self.sort else tokens
        return self.experts(tokens, [len(tokens) - 3, 3]).view_as(x)


@pytest.mark.parametrize(
    ("sort", "reason"),
    [(True, "the model chose or sorted them"), (False, "with tokens and a list, and what")],
)
def test_tokens_in_an_order_of_the_model_are_refused(sort: bool, reason: str) -> None:
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.weight"], init_lora_weights=False)
    model = get_peft_model(Packing(sort=sort), config)
    x = torch.randn(2, 2, 4)
    with pytest.raises(RoutingError, match=reason):
        model(x, adapter_names=["default", "__base__"])
    assert torch.equal(model(x, adapter_names=["default"] * 2), model(x))


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight[0]


def test_tokens_are_followed_in_a_compiled_model_but_not_in_a_part_compiled_by_itself() -> None:
    packing = Packing(sort=False)
    packing.experts, packing.forward = First(), lambda x: packing.experts(x.flatten(0, 1)).view_as(x)
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.weight"], init_lora_weights=False)
    model = get_peft_model(packing, config)
    x, names = torch.randn(2, 2, 4), ["default", "__base__"]
    expected = model(x, adapter_names=names)
    assert torch.equal(expected[0], model(x[:1])[0])
    model.compile(backend="eager")
    assert torch.equal(model(x, adapter_names=names), expected)
    packing._compiled_call_impl = None
    packing.experts.compile(backend="eager")
    with pytest.raises(RoutingError, match="a part that is compiled by itself"):
        model(x, adapter_names=names)


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


def test_experts_that_are_called_by_themselves_take_rows_too() -> None:
    experts = adapted(SPECIAL["parameters"].build()).get_base_model().experts
    x, chosen = torch.randn(2, 8), torch.tensor([0, 1])
    mixed = experts(x, chosen, adapter_names=["default", "__base__"])
    torch.testing.assert_close(mixed[:1], experts(x[:1], chosen[:1]))
    base = experts(x, chosen, adapter_names=["__base__", "__base__"])
    assert torch.equal(base, experts.get_base_layer()(x, chosen)) and not torch.equal(base[0], mixed[0])
    torch.testing.assert_close(mixed[1:], base[1:])
