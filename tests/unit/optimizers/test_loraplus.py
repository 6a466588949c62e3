"""What LoRA+ refuses; its groups are compared with the reference's in tests/interop."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from veneer import LoraConfig, create_loraplus_optimizer
from veneer.errors import ConfigError, TrainingError
from veneer.layers import wrap


def test_b_learns_faster_than_a() -> None:
    layer = wrap(nn.Linear(4, 3), LoraConfig(r=2, lora_alpha=6))
    optimizer = create_loraplus_optimizer(layer, torch.optim.SGD, lr=0.5, loraplus_lr_ratio=16, momentum=0.9)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    a, b, _ = layer.factors("default")
    assert rates == {id(a): 0.5, id(b): 8.0}
    assert all(g["momentum"] == 0.9 and g["weight_decay"] == 0.0 for g in optimizer.param_groups)


def test_refusals() -> None:
    layer = wrap(nn.Linear(4, 3), LoraConfig(r=2, lora_alpha=6))
    for ratio in (0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="loraplus_lr_ratio"):
            create_loraplus_optimizer(layer, torch.optim.SGD, lr=0.5, loraplus_lr_ratio=ratio)
    layer.requires_grad_(False)
    with pytest.raises(TrainingError, match="no parameter"):
        create_loraplus_optimizer(layer, torch.optim.SGD, lr=0.5, loraplus_lr_ratio=4)
