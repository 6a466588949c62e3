"""Matrices against their formula, written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.laws.cases import train
from tests.tolerances import assert_close
from veneer import LoraConfig
from veneer.layers import wrap


def wrapped(base: nn.Module, r: int = 4, **more: Any) -> Any:
    layer = wrap(base.double(), LoraConfig(r=r, lora_alpha=3 * r / 2, **more))
    train(layer, "default")
    return layer


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_matrices(kind: str, lora_bias: bool) -> None:
    layer = wrapped(nn.Linear(6, 5) if kind == "linear" else Conv1D(5, 6), lora_bias=lora_bias)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.shape == (4, 6) and b.shape == (5, 4)
    x = torch.randn(3, 6, dtype=torch.float64)
    extra = 1.5 * layer.lora_B["default"].bias if lora_bias else 0.0
    assert_close(layer(x), layer.base_layer(x) + 1.5 * x @ a.T @ b.T + extra)
    assert layer.get_delta_weight("default").shape == layer.base_layer.weight.shape
