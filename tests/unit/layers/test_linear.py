"""Matrices against their formula, written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module
from transformers.pytorch_utils import Conv1D

from tests.laws.cases import train
from tests.tolerances import assert_close
from veneer import LoraConfig
from veneer.layers import linear, wrap
from veneer.routing import routed


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


@torch.no_grad()
def test_a_decoding_step_asks_what_the_general_way_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shortest way is taken where it is right, gives the same, and leaves the rest to the general way."""
    short: list[torch.Size] = []
    way = linear.linear_of_few_rows

    def watched(x: torch.Tensor, *args: Any) -> torch.Tensor:
        short.append(x.shape)
        return way(x, *args)

    monkeypatch.setattr(linear, "linear_of_few_rows", watched)
    layer = wrapped(nn.Linear(6, 5), lora_dropout=0.5).eval()
    x = torch.randn(2, 1, 6, dtype=torch.float64)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer(x) + 1.5 * x @ a.T @ b.T
    assert_close(layer(x), expected)
    assert len(short) == 1
    layer.scaling["default"] = 3.0
    assert_close(layer(x), 2 * expected - layer.base_layer(x))
    layer.scaling["default"] = 1.5

    doubled = [
        module.register_forward_hook(lambda _m, _i, out: 2 * out)
        for module in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"])
    ]
    assert_close(layer(x), layer.base_layer(x) + 4 * 1.5 * x @ a.T @ b.T)
    for hook in doubled:
        hook.remove()
    assert not layer.train()(torch.ones(70, 6, dtype=torch.float64)).equal(layer(torch.ones(70, 6).double()))
    layer.eval()
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    torch.func.vmap(layer)(x)
    many = torch.randn(65, 6, dtype=torch.float64)
    assert_close(layer(many), layer.base_layer(many) + 1.5 * many @ a.T @ b.T)
    assert len(short) == 2


@pytest.mark.parametrize("state", ["merged", "nothing active"])
def test_a_base_that_is_plain_is_multiplied_with_and_another_is_called(state: str) -> None:
    """The product is the base's, bit for bit; hooks, subclasses and gradients are as they would be."""
    layer = wrapped(nn.Linear(6, 5)).eval()
    layer.merge() if state == "merged" else layer.set_adapter([])
    base, x = layer.base_layer, torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.equal(layer(x), base(x))
    ours, theirs = (torch.autograd.grad(module(x).square().sum(), x)[0] for module in (layer, base))
    assert torch.equal(ours, theirs)
    with base.register_forward_hook(lambda _m, _i, out: 2 * out):
        assert torch.equal(layer(x), base(x))
    with base.register_forward_pre_hook(lambda _m, args: (3 * args[0],)):
        assert torch.equal(layer(x), base(x))
    base.forward = lambda given: -nn.Linear.forward(base, given)
    assert torch.equal(layer(x), base(x))
    del base.forward

    class Doubled(nn.Linear):
        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(given)

    base.__class__ = Doubled
    assert torch.equal(layer(x), base(x))


GLOBAL_HOOKS = {
    "forward": module.register_module_forward_hook,
    "forward pre": module.register_module_forward_pre_hook,
    "backward": module.register_module_full_backward_hook,
    "backward pre": module.register_module_full_backward_pre_hook,
}


@pytest.mark.parametrize("kind", GLOBAL_HOOKS)
@pytest.mark.parametrize("state", ["active", "two", "dora", "merged", "nothing active", "rows"])
def test_hooks_of_all_modules_see_the_base(kind: str, state: str) -> None:
    layer = wrapped(nn.Linear(6, 5), use_dora=state == "dora").eval()
    if state in ("two", "rows"):
        wrap(layer, LoraConfig(r=2), "second")
        train(layer, "second", seed=7)
        layer.set_adapter(["default", "second"])
    elif state == "merged":
        layer.merge()
    elif state == "nothing active":
        layer.set_adapter([])
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    seen: list[nn.Module] = []

    def outputs() -> list[torch.Tensor]:
        names = ["default", "second", "__base__"] if state == "rows" else []
        with routed(layer, names):
            y = layer(x)
            (gradient,) = torch.autograd.grad(y.square().sum(), x)
            with torch.no_grad():
                return [y.detach(), gradient, layer(x)]

    expected = outputs()
    with GLOBAL_HOOKS[kind](lambda called, *_: seen.append(called)):  # type: ignore[operator, func-returns-value]
        for actual, wanted in zip(outputs(), expected, strict=True):
            assert_close(actual, wanted)
    assert seen.count(layer.base_layer) == (1 if kind.startswith("backward") else 2)
    seen.clear()
    outputs()
    assert not seen


@torch.no_grad()
@pytest.mark.parametrize("rows", [[], ["default", "default", "default"]])
def test_what_a_hook_of_all_modules_keeps_is_not_written(rows: list[str]) -> None:
    layer, x = wrapped(nn.Linear(6, 5)).eval(), torch.randn(3, 6, dtype=torch.float64)
    kept: list[torch.Tensor] = []
    with (
        module.register_module_forward_hook(
            lambda called, _, y: kept.append(y) if called is layer.base_layer else None
        ),
        routed(layer, rows),
    ):
        y = layer(x)
    assert torch.equal(kept[0], layer.base_layer(x)) and not torch.equal(kept[0], y)


@torch.no_grad()
@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_single_row(dtype: torch.dtype, lora_bias: bool) -> None:
    """Of any shape and strides: the matrix's first row."""
    layer = wrapped(nn.Linear(6, 5), lora_bias=lora_bias).to(dtype).eval()
    many = torch.randn(4, 12, dtype=dtype)[:, ::2]
    wanted = layer(many)
    for row in (many[0], many[:1], many[None, :1], many[:1, None]):
        assert_close(layer(row).flatten(), wanted[0])
