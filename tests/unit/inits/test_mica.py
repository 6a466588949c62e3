"""MiCA: B lies in the minor directions of the weight and is never trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.tolerances import assert_close
from veneer import LoraConfig, PeftModel, TargetError, get_peft_model, prepare_model_for_compiled_hotswap
from veneer.layers import LoraLayer, wrap


def config(r: int = 3, **more: object) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=2 * r, init_lora_weights="mica", **more)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))


def trained(model: nn.Module) -> set[str]:
    return {n.rpartition(".lora_")[2].split(".")[0] for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("base", [nn.Linear(9, 6), Conv1D(6, 9), nn.Embedding(12, 6)], ids=repr)
def test_b_spans_what_the_weight_does_least(base: nn.Module) -> None:
    layer = wrap(base, config())
    a, b, _ = layer.factors("default")
    weight = layer.matrix()
    assert not a.any() and a.requires_grad and not b.requires_grad
    assert_close(b.T @ b, torch.eye(3))
    u, s, _ = torch.linalg.svd(weight, full_matrices=False)
    assert_close((b.T @ weight).norm(), s[-3:].norm())
    assert_close(b @ b.T, u[:, -3:] @ u[:, -3:].T)


def test_b_stays_frozen_through_the_adapters_life(tmp_path: Path) -> None:
    model = get_peft_model(net(), config(target_modules=["0", "1"]))
    first: LoraLayer = model.base_model.model[0]
    before = first.factors("default")[1].clone()
    x: Tensor = torch.randn(7, 6)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
    assert trained(model) == {"A"}
    assert torch.equal(first.factors("default")[1], before) and first.factors("default")[0].any()
    model.add_adapter("other", config(target_modules=["0"]))
    model.set_adapter("other")
    model.set_adapter("default")
    assert not first.factors("default")[1].requires_grad
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path, is_trainable=True)
    assert_close(again(x), model(x))
    assert again.peft_config["default"].init_lora_weights == "mica"
    assert not again.base_model.model[0].factors("default")[1].requires_grad
    assert again.get_model_status().requires_grad == {"default": True}


def test_it_stays_frozen_when_it_is_padded() -> None:
    model = get_peft_model(net(), config(target_modules=["0", "1"]))
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    assert trained(model) == {"A"}


@pytest.mark.parametrize(
    ("base", "options", "reason"),
    [
        (nn.Linear(9, 2), {}, "directions of the weight, which has 2: too few for r=3"),
        (nn.Conv2d(4, 4, 3), {}, "is for linear layers and embeddings, and this is a Conv2d"),
        (nn.Linear(9, 6), {"use_dora": True}, "MiCA is not defined for the variant 'dora'"),
    ],
)
def test_refusals(base: nn.Module, options: dict[str, bool], reason: str) -> None:
    with pytest.raises(TargetError, match=reason):
        wrap(base, config(**options))
