"""LoftQ: a rounded base, and factors that make up for the rounding."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from veneer import LoftQConfig, LoraConfig, TargetError, VeneerWarning, get_peft_model
from veneer.ops.normal_float import round_to_bits


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 80))


def adapted(bits: int, rounds: int, r: int = 8) -> tuple[nn.Module, nn.Module]:
    base = net()
    config = LoraConfig(
        r=r,
        lora_alpha=3 * r,
        target_modules=["0"],
        init_lora_weights="loftq",
        loftq_config=LoftQConfig(loftq_bits=bits, loftq_iter=rounds),
    )
    return get_peft_model(copy.deepcopy(base), config), base


def error(model: nn.Module, base: nn.Module) -> float:
    """How far the adapted weight lies from the original one."""
    layer = model.get_base_model()[0]
    weight: Tensor = layer.base_layer.weight + layer.get_delta_weight("default")
    return float((weight - base[0].weight).detach().norm())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_nearer_to_the_weight_than_rounding_alone_and_no_worse_with_each_round(bits: int) -> None:
    base = net()
    plain = float((round_to_bits(base[0].weight, bits) - base[0].weight).detach().norm())
    errors = [error(*adapted(bits, rounds)) for rounds in (1, 2, 3, 5)]
    assert errors[0] < 0.95 * plain
    assert all(later <= earlier for earlier, later in pairwise(errors))


def test_the_base_holds_only_values_of_its_code() -> None:
    model, _ = adapted(2, 1)
    blocks = model.get_base_model()[0].base_layer.weight.detach().reshape(-1, 64)
    assert max(len(block.unique()) for block in blocks) <= 4


def test_a_rank_beyond_the_matrix_restores_the_weight() -> None:
    model, base = adapted(2, 1, r=100)
    assert error(model, base) < 1e-4 * float(base[0].weight.detach().norm())


def test_it_says_that_another_adapter_shares_the_replaced_base() -> None:
    model = get_peft_model(net(), LoraConfig(r=2, lora_alpha=4, target_modules=["0"]))
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["0"], init_lora_weights="loftq")
    with pytest.warns(VeneerWarning, match="'default' work on the same ones"):
        model.add_adapter("second", config)


def test_it_refuses_a_merged_base_and_leaves_it_alone() -> None:
    model = get_peft_model(
        net(), LoraConfig(r=2, lora_alpha=4, target_modules=["0"], init_lora_weights=False)
    )
    model.merge_adapter()
    before = model.get_base_model()[0].base_layer.weight.detach().clone()
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["0"], init_lora_weights="loftq")
    with pytest.raises(TargetError, match="unmerge first"):
        model.add_adapter("second", config)
    assert torch.equal(before, model.get_base_model()[0].base_layer.weight)
