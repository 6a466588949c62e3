"""Each geometry against its formula, written out with torch's own operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from tests.laws.cases import SamePadConv2d, train
from tests.tolerances import assert_close
from veneer import LoraConfig, TargetError
from veneer.errors import ConfigError
from veneer.layers import REFUSED, find, refusal, wrap


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


def test_lookups_keep_the_bases_options() -> None:
    layer = wrapped(nn.Embedding(7, 5, padding_idx=2))
    a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    assert a.shape == (4, 7) and b.shape == (5, 4)
    x = torch.tensor([[0, 2, 2], [6, 0, 0]])
    assert_close(layer(x), layer.base_layer(x) + 1.5 * (b @ a).T[x])
    layer(x).sum().backward()
    assert not a.grad[:, 2].any(), "the row of padding_idx gets no gradient"
    assert not a.grad[:, 1].any() and a.grad[:, 0].all()
    by_frequency = wrapped(nn.Embedding(7, 5, scale_grad_by_freq=True))
    by_frequency(x).sum().backward()
    plain = wrapped(nn.Embedding(7, 5))
    plain(x).sum().backward()
    ratio = by_frequency.lora_embedding_A["default"].grad / plain.lora_embedding_A["default"].grad
    assert_close(ratio[:, 0], torch.full((4,), 1 / 3, dtype=torch.float64))
    assert_close(ratio[:, 6], torch.ones(4, dtype=torch.float64))


def test_max_norm_limits_the_base_only() -> None:
    base = nn.Embedding(7, 5, max_norm=0.5)
    layer = wrapped(base)
    x = torch.arange(7)
    out = layer(x)
    rows = base.weight[x]
    assert (rows.norm(dim=1) <= 0.5 + 1e-6).all()
    delta = layer.get_delta_weight("default")
    assert_close(out, rows + delta)
    layer.merge()
    assert base.max_norm is None
    assert_close(layer(x), out)
    layer.unmerge()
    assert base.max_norm == 0.5


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


def test_lora_bias_of_an_embedding_is_refused() -> None:
    with pytest.raises((TargetError, ConfigError), match="embedding"):
        wrapped(nn.Embedding(3, 3), lora_bias=True)


def test_every_refused_type_exists_and_has_no_layer() -> None:
    for name, reason in REFUSED.items():
        module, _, cls = name.rpartition(".")
        kind = getattr(__import__(module, fromlist=[cls]), cls)
        made = kind.__new__(kind)
        assert f"{kind.__module__}.{kind.__qualname__}" == name
        assert find(made) is None and refusal(made) == reason
    with pytest.raises(TargetError, match="reduces over bags"):
        wrap(nn.EmbeddingBag(3, 3), LoraConfig())
    with pytest.raises(TargetError, match="no layer for this type"):
        wrap(nn.LayerNorm(3), LoraConfig())
