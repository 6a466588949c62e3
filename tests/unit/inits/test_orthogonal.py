"""Orthogonal starts: a product of zero from factors that are not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.tolerances import assert_close
from veneer import LoraConfig, TargetError
from veneer.layers import wrap


def config(r: int = 8) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=3 * r / 2, init_lora_weights="orthogonal")


@pytest.mark.parametrize(
    "base",
    [
        nn.Linear(96, 64),
        Conv1D(64, 96),
        nn.Embedding(200, 64),
        nn.Conv2d(12, 24, 3),
    ],
    ids=["linear", "conv1d", "embedding", "conv"],
)
def test_the_product_is_zero_and_neither_factor_is(base: nn.Module) -> None:
    torch.manual_seed(0)
    layer = wrap(base, config())
    a, b, _ = layer.factors("default")
    delta = layer.get_delta_weight("default")
    size = float(a.detach().norm() * b.detach().norm())
    assert size > 1.0
    assert_close(delta.detach() / size, torch.zeros_like(delta))


def test_scale_of_the_factors_and_both_learn() -> None:
    torch.manual_seed(0)
    layer = wrap(nn.Linear(400, 300), config(32))
    a, b, _ = layer.factors("default")
    # Each entry is a sum of r/2 products of N(0, 1) with entries of variance 1/r, over 10.
    for factor in (a, b):
        assert abs(float(factor.detach().std()) - 0.1 * 0.5**0.5) < 0.005
    layer(torch.randn(5, 400)).square().sum().backward()
    assert a.grad is not None and a.grad.any() and b.grad is not None and b.grad.any()


def test_an_odd_rank_is_refused() -> None:
    with pytest.raises(TargetError, match="even rank, got r=3"):
        wrap(nn.Linear(8, 8), config(3))


def test_groups_are_refused() -> None:
    with pytest.raises(TargetError, match="groups"):
        wrap(nn.Conv2d(12, 24, 3, groups=4), config())
