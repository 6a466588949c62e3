"""DoRA against the reference: the same files, start, outputs, gradients and merged weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import veneer
from tests.interop.reference import both, expect_same_model, from_reference, output, peft, quiet, stored
from tests.tolerances import assert_close
from veneer.testing import registered_for_now
from veneer.variants.plain import Plain


class One(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.q = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], dict[str, Any]]] = {
    "linear": (lambda: nn.Linear(12, 10), lambda: torch.randn(3, 12), {}),
    "no bias, 3-D, rslora": (
        lambda: nn.Linear(12, 10, bias=False),
        lambda: torch.randn(2, 3, 12),
        {"use_rslora": True},
    ),
    "Conv1D": (lambda: Conv1D(10, 12), lambda: torch.randn(2, 3, 12), {"fan_in_fan_out": True}),
    "embedding": (lambda: nn.Embedding(11, 8), lambda: torch.randint(0, 11, (3, 4)), {}),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), lambda: torch.randn(2, 4, 9), {}),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), lambda: torch.randn(2, 4, 9, 9), {}),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2, bias=False), lambda: torch.randn(2, 4, 5, 5, 5), {}),
    "runtime": (
        lambda: nn.Linear(12, 10),
        lambda: torch.randn(3, 12),
        {"runtime_config": veneer.LoraRuntimeConfig(ephemeral_gpu_offload=False)},
    ),
}
each = pytest.mark.parametrize("case", CASES)


def pair(case: str, **more: Any) -> tuple[veneer.PeftModel, Any, Tensor]:
    build, x, options = CASES[case]
    torch.manual_seed(3)
    layer = build()
    ours, theirs = both(
        lambda: One(layer),
        {"r": 4, "lora_alpha": 6, "target_modules": ["q"], "use_dora": True} | options | more,
    )
    return ours, theirs, x()


def move(ours: nn.Module, theirs: nn.Module, adapter: str = "default") -> None:
    """Give both the same values, as training might leave them."""
    generator = torch.Generator().manual_seed(7)
    values = {
        key: torch.randn(tensor.shape, generator=generator) * 0.3 + ("magnitude" in key)
        for key, tensor in veneer.get_peft_model_state_dict(ours, adapter_name=adapter).items()
    }
    veneer.set_peft_model_state_dict(ours, copy.deepcopy(values), adapter_name=adapter)
    with quiet():
        peft.set_peft_model_state_dict(theirs, copy.deepcopy(values), adapter_name=adapter)


@each
def test_the_start(case: str) -> None:
    ours, theirs, x = pair(case)
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if "magnitude" not in k}, strict=False)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    for (name, mine), (_, its) in zip(
        sorted(ours.named_parameters()), sorted(theirs.named_parameters()), strict=True
    ):
        assert mine.requires_grad == its.requires_grad and mine.shape == its.shape, name
        assert_close(mine, its)
    assert_close(output(ours, x), output(theirs, x))


@each
@pytest.mark.parametrize("dropout", [0.0, 1e-12])
def test_outputs_and_gradients(case: str, dropout: float) -> None:
    # So small a dropout drops nothing, but takes the reference down its other path.
    ours, theirs, x = pair(case, lora_dropout=dropout)
    move(ours, theirs)
    grads = []
    for model in (ours.train(), theirs.train()):
        given = x.clone().requires_grad_(x.is_floating_point())
        y = model(given)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        table = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        grads.append({**table, "x": given.grad, "y": y.detach()})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        if grad is not None:
            assert_close(grad, grads[1][name])


@each
def test_merged_weights(case: str) -> None:
    ours, theirs, x = pair(case)
    move(ours, theirs)
    expected = output(ours, x)
    ours.merge_adapter()
    with quiet():
        theirs.merge_adapter()
    assert_close(output(ours, x), output(theirs, x))
    assert_close(output(ours, x), expected)
    ours.unmerge_adapter()
    assert torch.equal(output(ours, x), expected)


@each
def test_files_both_ways(case: str, tmp_path: Path) -> None:
    ours, theirs, x = pair(case)
    move(ours, theirs)
    base = One(copy.deepcopy(ours.get_base_model().q.base_layer))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    assert stored(tmp_path / "ours").keys() == stored(tmp_path / "theirs").keys()
    there = from_reference(base, tmp_path / "ours")
    here = veneer.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")
    assert here.peft_config["default"].use_dora
    expect_same_model(here, there)
    assert_close(output(there, x), output(ours, x))
    assert torch.equal(output(here, x), output(ours, x))


@pytest.mark.parametrize("case", ["linear", "conv2d"])
def test_two_adapters_as_the_reference_adds_them_in_training(case: str) -> None:
    ours, theirs, x = pair(case, lora_dropout=1e-12)
    options = {"r": 2, "lora_alpha": 6, "target_modules": ["q"], "use_dora": True, "lora_dropout": 1e-12}
    ours.add_adapter("other", veneer.LoraConfig(**options))
    with quiet():
        theirs.add_adapter("other", peft.LoraConfig(**options))
    for name in ("default", "other"):
        move(ours, theirs, name)
    for model in (ours, theirs):
        model.base_model.set_adapter(["default", "other"])
        model.train()
    assert_close(ours(x), theirs(x))


def test_bfloat16() -> None:
    ours, theirs, x = pair("linear", bias="none")
    move(ours, theirs)
    for model in (ours, theirs):
        model.base_model.model.q.base_layer.to(torch.bfloat16)
    assert_close(output(ours, x.bfloat16()), output(theirs, x.bfloat16()))


def test_a_variant_of_a_plug_in_is_refused_by_the_reference(tmp_path: Path) -> None:
    with registered_for_now():

        class Same(veneer.variants.Variant):
            name = "same"
            forward = Plain.forward
            merged = Plain.merged

        options = {"r": 2, "lora_alpha": 6, "target_modules": ["q"], "variant": "same"}
        veneer.get_peft_model(One(nn.Linear(4, 3)), veneer.LoraConfig(**options)).save_pretrained(tmp_path)
    with quiet(), pytest.raises(KeyError, match="LORA:same"):
        peft.PeftModel.from_pretrained(One(nn.Linear(4, 3)), str(tmp_path))
