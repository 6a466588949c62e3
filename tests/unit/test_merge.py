"""What one layer refuses to merge, and what it is after a merge that failed."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from tests.laws.cases import train
from tests.laws.snapshots import Snapshot
from tests.tolerances import assert_close
from veneer import LoraConfig, MergeError
from veneer.layers import LoraLayer, wrap


def layer(dtype: torch.dtype = torch.float32, **options: Any) -> LoraLayer:
    torch.manual_seed(0)
    made = wrap(nn.Linear(6, 5).to(dtype), LoraConfig(**{"r": 2, "lora_alpha": 6, **options}), "a")
    train(made, "a")
    return made


class Doubling(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


# -- what is not finite --------------------------------------------------------------------------------

BREAKS = {
    "A": lambda made: made.lora_A["a"].weight,
    "B": lambda made: made.lora_B["a"].weight,
    "the bias of B": lambda made: made.lora_B["a"].bias,
}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("what", BREAKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_an_adapter_that_is_not_finite_is_never_merged(
    dtype: torch.dtype, what: str, safe: bool, value: float
) -> None:
    made = layer(dtype, lora_bias=True)
    with torch.no_grad():
        BREAKS[what](made).view(-1)[0] = value
    before = Snapshot(made)
    with pytest.raises(MergeError, match="'a' holds values that are NaN or infinite"):
        made.merge(safe_merge=safe)
    before.assert_same(made)


@pytest.mark.parametrize("base", [nn.Linear, "conv", "embedding"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_nor_one_of_any_geometry_or_variant(base: Any, options: dict[str, Any]) -> None:
    modules = {"conv": nn.Conv2d(3, 4, 2), "embedding": nn.Embedding(7, 5), nn.Linear: nn.Linear(6, 5)}
    made = wrap(modules[base], LoraConfig(r=2, lora_alpha=6, **options), "a")
    for parameter in [*made.adapter_parameters("a")]:
        value = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[0] = math.nan
        with pytest.raises(MergeError, match="NaN or infinite"):
            made.merge()
        with torch.no_grad():
            parameter.copy_(value)
    assert made.merge() > 0.99


def test_a_strength_that_is_not_finite() -> None:
    made = layer()
    made.scaling["a"] = math.inf
    with pytest.raises(MergeError, match="NaN or infinite"):
        made.merge()


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_a_sum_that_leaves_the_range_is_refused_without_being_asked(options: dict[str, Any]) -> None:
    made = layer(torch.float16, **options)
    with torch.no_grad():
        if options:
            made.lora_magnitude_vector["a"].weight[:] = 1e30
        else:
            made.lora_A["a"].weight[:], made.lora_B["a"].weight[:] = 1e4, 1e4
    before = Snapshot(made)
    with pytest.raises(MergeError, match=r"(range of|in) torch\.float16"):
        made.merge()
    before.assert_same(made)


def test_a_bias_that_leaves_the_range() -> None:
    made = layer(torch.float16, lora_bias=True)
    with torch.no_grad():
        made.lora_B["a"].bias[0] = 6e4
    before = Snapshot(made)
    with pytest.raises(MergeError, match=r"merged bias would hold infinite .* in torch\.float16"):
        made.merge()
    before.assert_same(made)


def test_a_base_that_is_not_finite_is_refused_when_asked_and_else_no_update_is_said_to_be_kept() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        made = layer(dtype)
        with torch.no_grad():
            made.base_layer.weight[0, 0] = math.nan
        with pytest.raises(MergeError, match="NaN or infinite already"):
            made.merge(safe_merge=True)
        assert math.isnan(made.merge())
    made = layer(lora_bias=True)
    with torch.no_grad():
        made.base_layer.bias[0] = math.nan
    with pytest.raises(MergeError, match="merged bias"):
        made.merge(safe_merge=True)
    made.merge()
    assert made.base_layer.bias.isnan().sum() == 1


def test_unmerging_one_of_two_may_leave_the_range_and_then_changes_nothing() -> None:
    made = layer(torch.float16)
    wrap(made, LoraConfig(r=2, lora_alpha=6), "b")
    with torch.no_grad():
        for name, sign in (("a", 1.0), ("b", -1.0)):
            made.lora_A[name].weight[:], made.lora_B[name].weight[:] = 1e3, sign * 1e2
    original = made.base_layer.weight.detach().clone()
    made.merge(adapter_names=["a", "b"])
    merged = made.base_layer.weight.detach().clone()
    with pytest.raises(MergeError, match="without 'b', "):
        made.unmerge(["b"])
    assert made.merged_adapters == ["a", "b"] and torch.equal(made.base_layer.weight, merged)
    made.unmerge()
    assert torch.equal(made.base_layer.weight, original)


# -- what cannot be written ----------------------------------------------------------------------------


def test_a_bias_that_is_computed_from_another_tensor() -> None:
    made = layer(lora_bias=True)
    parametrize.register_parametrization(made.base_layer, "bias", Doubling())
    before = Snapshot(made)
    with pytest.raises(MergeError, match="its bias is computed from other tensors"):
        made.merge()
    before.assert_same(made)


# -- merged without an undo ----------------------------------------------------------------------------


def test_after_a_merge_for_good_another_is_added_and_the_original_is_refused() -> None:
    made, x = layer(), torch.randn(3, 6)
    wrap(made, LoraConfig(r=2, lora_alpha=6, init_lora_weights=False), "b")
    wrap(made, LoraConfig(r=2, use_dora=True), "c")
    made.set_adapter(["a", "b"])
    expected = made(x)
    made.merge(adapter_names=["a"], undo=None)
    assert_close(made(x), expected)
    with pytest.raises(MergeError, match="'a' was merged without an undo"):
        made.merge(adapter_names=["b"])
    with pytest.raises(MergeError, match="'a' was merged without an undo"):
        made.merge(adapter_names=["c"], undo=None)
    made.merge(adapter_names=["b"], undo=None)
    assert_close(made(x), expected)
    made.enable_adapters(False)
    for ask in (lambda: made(x), made.original_base, made.matrix):
        with pytest.raises(MergeError, match="load the base again"):
            ask()


# -- failures half-way ---------------------------------------------------------------------------------


def stop_half_way(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let the next write of a weight stop after some of it."""

    def broken(weight: torch.Tensor, *args: Any, **options: Any) -> float:
        weight[:2] = 7.0
        raise error

    monkeypatch.setattr("veneer.merge.merge_into_", broken)


def copies(made: LoraLayer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in made.base_layer.state_dict().items()}


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("undo", ["copy", None])
@pytest.mark.parametrize("merged", [False, True])
def test_a_write_that_stops_half_way(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, undo: Any, merged: bool
) -> None:
    made, x = layer(torch.bfloat16, lora_bias=True), torch.randn(3, 6, dtype=torch.bfloat16)
    wrap(made, LoraConfig(r=2, lora_alpha=6, lora_bias=True, init_lora_weights=False), "b")
    made.set_adapter(["a", "b"])
    original = copies(made)
    if merged:
        made.merge(adapter_names=["a"])
    before = Snapshot(made)
    expected = made(x)
    with monkeypatch.context() as patch:
        stop_half_way(patch, error)
        with pytest.raises(type(error)):
            made.merge(undo=undo)
    before.assert_same(made, written=True)
    assert made.merged_adapters == (["a"] if merged else [])
    assert torch.equal(made(x), expected)
    made.unmerge()
    assert all(torch.equal(tensor, original[name]) for name, tensor in made.base_layer.state_dict().items())


def test_unmerging_one_of_two_that_stops_half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer(torch.bfloat16, lora_bias=True)
    wrap(made, LoraConfig(r=2, lora_alpha=6, lora_bias=True, init_lora_weights=False), "b")
    original = copies(made)
    made.merge(adapter_names=["a", "b"])
    before = Snapshot(made)
    with monkeypatch.context() as patch:
        stop_half_way(patch, RuntimeError("out of memory"))
        with pytest.raises(RuntimeError, match="out of memory"):
            made.unmerge(["a"])
    before.assert_same(made, written=True)
    assert made.merged_adapters == ["a", "b"]
    made.unmerge()
    assert all(torch.equal(tensor, original[name]) for name, tensor in made.base_layer.state_dict().items())


@pytest.mark.parametrize("bias", [False, True])
def test_unmerging_all_that_stops_half_way(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    made, x = layer(torch.bfloat16, lora_bias=bias), torch.randn(3, 6, dtype=torch.bfloat16)
    original = copies(made)
    made.merge()
    before, expected = Snapshot(made), made(x)
    put_back = type(made.backend).put_back

    def broken(*arguments: Any) -> None:
        put_back(*arguments)
        monkeypatch.undo()
        raise RuntimeError("late")

    monkeypatch.setattr(type(made.backend), "put_back", broken)
    with pytest.raises(RuntimeError, match="late"):
        made.unmerge()
    before.assert_same(made, written=True)
    assert made.merged_adapters == ["a"] and torch.equal(made(x), expected)
    made.unmerge()
    assert all(torch.equal(tensor, original[name]) for name, tensor in made.base_layer.state_dict().items())


def test_a_bias_that_was_merged_before_stays_if_a_merge_without_one_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, x = layer(lora_bias=True), torch.randn(3, 6)
    wrap(made, LoraConfig(r=2, lora_alpha=6, init_lora_weights=False), "b")
    made.set_adapter(["a", "b"])
    made.merge(adapter_names=["a"])
    before, expected = Snapshot(made), made(x)
    with monkeypatch.context() as patch:
        stop_half_way(patch, RuntimeError("out of memory"))
        with pytest.raises(RuntimeError, match="out of memory"):
            made.merge(adapter_names=["b"])
    before.assert_same(made, written=True)
    assert made.merged_adapters == ["a"] and torch.equal(made(x), expected)


def test_a_convolution_gets_its_groups_and_its_very_weight_back(monkeypatch: pytest.MonkeyPatch) -> None:
    made = wrap(nn.Conv1d(4, 4, 3, groups=2), LoraConfig(r=2, lora_bias=True, init_lora_weights=False), "a")
    before, weight = Snapshot(made), made.base_layer.weight
    write = type(made.backend).write

    def broken(self: Any, module: nn.Module, tensor: torch.Tensor, name: str = "weight") -> None:
        if name == "bias":  # after the weight
            monkeypatch.undo()
            raise RuntimeError("late")
        write(self, module, tensor, name)

    monkeypatch.setattr(type(made.backend), "write", broken)
    with pytest.raises(RuntimeError, match="late"):
        made.merge()
    before.assert_same(made, written=True)
    assert made.base_layer.weight is weight and made.base_layer.groups == 2


# -- what is merged stays ------------------------------------------------------------------------------


def test_a_merged_adapter_keeps_its_name_and_its_update_when_renamed() -> None:
    made, x = layer(), torch.randn(3, 6)
    wrap(made, LoraConfig(r=2, lora_alpha=6, init_lora_weights=False), "b")
    made.set_adapter(["a", "b"])
    expected = made(x)
    made.merge(adapter_names=["a"])
    made.rename_adapter("a", "z")
    made.set_strength("z", 0.0)
    made.merge(adapter_names=["b"])
    assert made.merged_adapters == ["z", "b"]
    assert_close(made(x), expected)
    twin = copy.deepcopy(made)
    twin.unmerge(["b"])
    twin.enable_adapters(True)
    assert_close(twin(x), expected)


def test_the_undo_survives_a_cast_beside_the_factors_as_they_were() -> None:
    made, x = layer(), torch.randn(3, 6)
    wrap(made, LoraConfig(r=2, lora_alpha=6, init_lora_weights=False), "b")
    made.set_adapter(["a", "b"])
    expected = made(x)
    made.merge()
    made.double()
    made.unmerge(["a"])
    assert_close(made(x.double()), expected)
