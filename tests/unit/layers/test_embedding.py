"""Lookups against their formula, written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.laws.cases import train
from tests.tolerances import assert_close
from veneer import LoraConfig, TargetError
from veneer.errors import ConfigError
from veneer.layers import wrap


def wrapped(base: nn.Module, r: int = 4, **more: Any) -> Any:
    layer = wrap(base.double(), LoraConfig(r=r, lora_alpha=3 * r / 2, **more))
    train(layer, "default")
    return layer


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


def test_lora_bias_of_an_embedding_is_refused() -> None:
    with pytest.raises((TargetError, ConfigError), match="embedding"):
        wrapped(nn.Embedding(3, 3), lora_bias=True)
