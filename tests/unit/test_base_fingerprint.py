"""The fingerprint of a model's base, adapted or not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.laws.cases import train
from veneer import LoraConfig, get_peft_model
from veneer.base_fingerprint import base_fingerprint
from veneer.layers import LoraLayer


def net() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3))


def test_the_fingerprint_is_that_of_the_base_without_adapters() -> None:
    torch.manual_seed(1)
    model = get_peft_model(net(), LoraConfig(target_modules=["0", "1"]))
    train(model, "default")
    fresh = base_fingerprint(model.get_base_model())
    model.merge_adapter()
    assert base_fingerprint(model.get_base_model()) == fresh
    torch.manual_seed(2)
    assert (
        base_fingerprint(get_peft_model(net(), LoraConfig(target_modules=["0", "1"])).get_base_model())
        != fresh
    )


def test_a_fingerprint_asks_for_those_originals_alone_that_it_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = get_peft_model(
        nn.Sequential(*(nn.Linear(4, 4) for _ in range(40))), LoraConfig(target_modules="all-linear")
    )
    fresh = base_fingerprint(model.get_base_model())
    train(model, "default")
    model.merge_adapter()
    asked: list[LoraLayer] = []
    original = LoraLayer.original_base
    monkeypatch.setattr(LoraLayer, "original_base", lambda self: asked.append(self) or original(self))
    assert base_fingerprint(model.get_base_model()) == fresh
    assert len(asked) == len(fresh["samples"]) == 16
