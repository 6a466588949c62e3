"""DoRA: its formula, what its gradient leaves out, what it keeps, and how adapters add up."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.laws.cases import train
from tests.tolerances import assert_close
from veneer import LoraConfig
from veneer.errors import TargetError
from veneer.layers import LoraLayer, wrap
from veneer.layers.linear import LoraLinear
from veneer.ops import row_norms
from veneer.variants import dora

MAGNITUDE = "lora_magnitude_vector"


def made(base: nn.Module | None = None, **options: Any) -> LoraLayer:
    torch.manual_seed(0)
    layer = wrap(base or nn.Linear(6, 5), LoraConfig(**{"r": 2, "lora_alpha": 6, "use_dora": True} | options))
    train(layer, "default")
    return layer.double()


def test_the_formula_and_a_norm_without_gradient() -> None:
    layer, x = made(), torch.randn(3, 6, dtype=torch.float64)
    a, b, _ = layer.factors("default")
    m = layer.extra("default")[MAGNITUDE]
    base: Any = layer.base_layer
    whole = base.weight + 3.0 * b @ a
    expected = x @ (m[:, None] * whole / whole.detach().norm(dim=1)[:, None]).T + base.bias
    assert_close(layer(x), expected)
    weights = torch.randn(3, 5, dtype=torch.float64)
    ours = torch.autograd.grad((layer(x) * weights).sum(), (a, b, m))
    theirs = torch.autograd.grad((expected * weights).sum(), (a, b, m))
    for mine, its in zip(ours, theirs, strict=True):
        assert_close(mine, its)


def test_it_starts_at_the_norms_of_the_weight_with_the_update() -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 5)
    layer = wrap(base, LoraConfig(r=2, lora_alpha=6, use_dora=True, init_lora_weights=False))
    a, b, _ = layer.factors("default")
    assert_close(layer.extra("default")[MAGNITUDE], (base.weight + 3.0 * b @ a).norm(dim=1))
    assert layer.use_dora == {"default": True}


def test_beside_a_replaced_base_it_starts_at_the_norms_of_that() -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 5)
    layer = wrap(base, LoraConfig(r=2, lora_alpha=6, use_dora=True, init_lora_weights="loftq"))
    a, b, _ = layer.factors("default")
    assert_close(layer.extra("default")[MAGNITUDE], (base.weight + 3.0 * b @ a).norm(dim=1))


def test_a_row_of_zeros_stays_zero() -> None:
    base = nn.Linear(6, 5, bias=False)
    with torch.no_grad():
        base.weight[2] = 0.0
    layer = wrap(base, LoraConfig(r=2, lora_alpha=6, use_dora=True))
    x = torch.randn(3, 6)
    y = layer(x)
    assert not y[:, 2].any() and y.isfinite().all()
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.adapter_parameters("default") if p.grad is not None)
    layer.merge()
    assert base.weight.isfinite().all()


def test_the_bias_of_the_base_is_not_scaled_and_trains_as_by_itself() -> None:
    layer, x = made(), torch.randn(3, 6, dtype=torch.float64)
    bias: Any = layer.base_layer.bias
    bias.requires_grad_(True)
    for part in (layer, layer.train()):
        (grad,) = torch.autograd.grad(part(x).sum(), bias)
        assert_close(grad, torch.full((5,), 3.0, dtype=torch.float64))


def test_the_fused_step_equals_the_general_one(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = made(), torch.randn(3, 6, dtype=torch.float64)
    fused = layer(x)
    monkeypatch.setattr(LoraLinear, "fused_step", lambda self, x: None)
    assert_close(layer(x), fused)


def test_with_dropout_the_base_sees_the_dropped_input_in_what_is_added() -> None:
    layer, x = made(lora_dropout=0.5).train(), torch.randn(4, 6, dtype=torch.float64)
    base: Any = layer.base_layer
    torch.manual_seed(5)
    dropped = layer.lora_dropout["default"](x)
    a, b, _ = layer.factors("default")
    norms = (base.weight + 3.0 * b @ a).norm(dim=1)
    c = layer.extra("default")[MAGNITUDE] / norms
    plain = dropped @ base.weight.T
    torch.manual_seed(5)
    assert_close(layer(x), base(x) + (c - 1) * plain + c * 3.0 * (dropped @ a.T @ b.T))


def test_two_of_them_each_add_their_own_difference() -> None:
    layer, x = made(), torch.randn(4, 6, dtype=torch.float64)
    wrap(layer, LoraConfig(r=3, lora_alpha=6, use_dora=True, init_lora_weights=False), "other")
    train(layer, "other", seed=8)
    layer.double()
    alone = {}
    for name in ("default", "other"):
        layer.set_adapter(name)
        alone[name] = layer(x)
    for names in (["default", "other"], ["other", "default"]):
        layer.set_adapter(names)
        assert_close(layer(x), sum(alone.values()) - layer.base_layer(x))


def test_b_with_a_bias_is_refused() -> None:
    with pytest.raises(TargetError, match="exclude one another"):
        made(lora_bias=True)


VIEWS = ("aten::t", "aten::detach", "aten::transpose")


class Counter:
    """Counts the computations of norms."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.squares = self.norms = 0

        def squared(weight: Tensor) -> Tensor:
            self.squares += 1
            return row_norms.squared_row_norms(weight)

        def updated(*args: Any) -> Tensor:
            self.norms += 1
            return row_norms.updated_row_norms(*args)

        monkeypatch.setattr(dora, "squared_row_norms", squared)
        monkeypatch.setattr(dora, "updated_row_norms", updated)

    def of(self, layer: LoraLayer, x: Tensor) -> tuple[int, int]:
        self.squares = self.norms = 0
        layer(x)
        return self.squares, self.norms


def test_what_is_kept_and_when_it_is_computed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = made(), torch.randn(3, 6, dtype=torch.float64)
    count = Counter(monkeypatch)
    layer.train()
    assert count.of(layer, x) == (1, 1)
    assert count.of(layer, x) == (0, 1), "the base's norms are kept in training"
    layer.eval()
    assert count.of(layer, x) == (0, 1), "with gradients nothing more is kept"
    with torch.no_grad():
        assert [count.of(layer, x) for _ in range(3)] == [(0, 1), (0, 0), (0, 0)]
        layer.scale_layer(2.0)
        assert [count.of(layer, x) for _ in range(2)] == [(0, 1), (0, 0)]
        layer.factors("default")[0].mul_(2.0)
        assert [count.of(layer, x) for _ in range(2)] == [(0, 1), (0, 0)]
        layer.base_layer.weight.mul_(2.0)
        assert [count.of(layer, x) for _ in range(2)] == [(1, 1), (0, 0)]
        layer.float()
        assert [count.of(layer, x.float()) for _ in range(2)] == [(1, 1), (0, 0)]
    with torch.inference_mode():
        assert count.of(layer, x.float()) == (0, 0)


def test_what_is_kept_is_no_part_of_the_layer() -> None:
    layer, x = made(), torch.randn(3, 6, dtype=torch.float64)
    names, held = set(layer.state_dict()), set(vars(layer))
    with torch.no_grad():
        expected = layer(x)
    assert set(layer.state_dict()) == names and set(vars(layer)) == held
    assert layer in dora._memos
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin not in dora._memos
        assert torch.equal(twin(x), expected)


def test_no_tensor_as_large_as_the_weight_is_made() -> None:
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and func._schema.name not in VIEWS:
                sizes.append(out.numel())
            return out

    layer = made(nn.Linear(64, 96)).float()
    with Watch():
        layer(torch.randn(2, 64)).sum().backward()
    assert max(sizes) < 64 * 96 / 4


def test_a_row_that_its_update_nearly_cancels_is_what_merging_makes_of_it() -> None:
    torch.manual_seed(0)
    layer = wrap(nn.Linear(64, 6), LoraConfig(r=2, lora_alpha=2, use_dora=True))
    with torch.no_grad():
        a, b, _ = layer.factors("default")
        a[0], b[3, 0] = layer.base_layer.weight[3] * -0.997, 1.0
    x = torch.randn(8, 64)
    unmerged = layer(x)
    layer.merge()
    assert_close(layer(x), unmerged)
