"""Convolutions against their formula, written out with torch's own operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.laws.cases import SamePadConv2d, train
from tests.tolerances import assert_close
from veneer import LoraConfig, TargetError
from veneer.layers import wrap


def wrapped(base: nn.Module, r: int = 4, **more: Any) -> Any:
    layer = wrap(base.double(), LoraConfig(r=r, lora_alpha=3 * r / 2, **more))
    train(layer, "default")
    return layer


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
def test_convolutions(dims: int, groups: int, mode: str) -> None:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    base = kind(4, 6, 3, stride=2, padding=1, dilation=1, groups=groups, padding_mode=mode)
    layer = wrapped(base)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.shape == (4, 4, *[3] * dims) and b.shape == (6, 4 // groups, *[1] * dims)
    x = torch.randn(2, 4, *[6] * dims, dtype=torch.float64)
    padded = F.pad(x, [1] * 2 * dims, mode="constant" if mode == "zeros" else mode)
    branch = convolve(convolve(padded, a, stride=2), b, groups=groups)
    assert_close(layer(x), base(x) + 1.5 * branch)


def test_a_subclass_of_a_convolution_does_its_own_padding_for_the_branch() -> None:
    base = SamePadConv2d((3, 4), 3, step=2, image_size=8)
    layer = wrapped(base)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    branch = F.conv2d(F.conv2d(F.pad(x, (0, 1, 0, 1)), a, stride=2), b)
    assert_close(layer(x), base(x) + 1.5 * branch)


def test_groups_that_do_not_divide_the_rank_are_refused() -> None:
    with pytest.raises(TargetError, match="3 groups"):
        wrapped(nn.Conv1d(6, 6, 1, groups=3), r=4)
