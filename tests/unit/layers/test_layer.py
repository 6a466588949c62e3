"""The one layer: mirrored attributes, views, strength, and the kinds of input that break others."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.laws.cases import train
from tests.tolerances import assert_close
from veneer import LoraConfig
from veneer.errors import AdapterNameError, MergeError
from veneer.layers import Factor, LoraLayer, wrap
from veneer.layers.factor import stand_in


def layer(**more: object) -> LoraLayer:
    made = wrap(nn.Linear(6, 5), LoraConfig(r=2, lora_alpha=6, **more), "a")
    train(made, "a")
    return made


def test_views_with_the_fields_names() -> None:
    made = layer(use_rslora=True, lora_bias=True)
    assert made.r == {"a": 2} and made.lora_alpha == {"a": 6} and made.use_rslora == {"a": True}
    assert made.scaling == {"a": pytest.approx(6 / 2**0.5)}
    assert made.lora_bias == {"a": True} and made.use_dora == {"a": False}
    assert made.active_adapters == ["a"] and made.merged_adapters == [] and not made.merged
    assert made.get_base_layer() is made.base_layer
    assert (made.in_features, made.out_features) == (6, 5)
    assert made.weight is made.base_layer.weight and made.bias is made.base_layer.bias
    with pytest.raises(AttributeError):
        _ = made.does_not_exist
    with pytest.raises(AdapterNameError, match="'b'"):
        made.get_delta_weight("b")


@pytest.mark.parametrize(
    ("base", "sizes"),
    [
        (nn.Embedding(7, 3), (7, 3)),
        (nn.Conv2d(3, 4, 3), (3, 4)),
        (nn.Conv1d(4, 6, 3, groups=2), (4, 6)),
        (Conv1D(5, 4), (4, 5)),
        (nn.MultiheadAttention(8, 2), (8, 24)),
    ],
)
def test_every_layer_has_its_sizes(base: nn.Module, sizes: tuple[int, int]) -> None:
    made = wrap(base, LoraConfig(r=2), "a")
    assert (made.in_features, made.out_features) == sizes


def test_names_in_memory_are_the_fields() -> None:
    assert set(layer(lora_bias=True).state_dict()) == {
        "base_layer.weight",
        "base_layer.bias",
        "lora_A.a.weight",
        "lora_B.a.weight",
        "lora_B.a.bias",
    }
    made = layer()
    made.merge()
    assert len(made.state_dict()) == 4


def test_strength_is_the_layers_own() -> None:
    made, x = layer(), torch.randn(3, 6)
    base, one = made.base_layer(x), made(x)
    made.set_scale("a", 0.5)
    assert_close(made(x) - base, 0.5 * (one - base))
    made.unscale_layer()
    made.scale_layer(3.0)
    assert_close(made(x) - base, 3 * (one - base))
    made.unscale_layer(3.0)
    assert_close(made(x), one)
    made.set_scale("unknown", 2.0)
    assert made.scaling == {"a": 3.0}


def test_factors_are_not_linears_and_cast_themselves() -> None:
    factor = Factor(torch.randn(3, 4), torch.randn(3))
    assert not isinstance(factor, nn.Linear)
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    assert factor(x).dtype == torch.bfloat16
    assert "3×4" in repr(factor)


def test_a_stand_in_shares_everything_but_what_is_given() -> None:
    base = nn.Linear(3, 2)
    state = {k: v.clone() for k, v in base.state_dict().items()}
    twin = stand_in(base, {"weight": torch.zeros(2, 3)}, {"extra": 1})
    assert torch.equal(twin(torch.ones(3)), base.bias) and twin.bias is base.bias
    assert not hasattr(base, "extra")
    assert all(torch.equal(v, state[k]) for k, v in base.state_dict().items())


def test_merging_without_an_undo_cannot_be_taken_back() -> None:
    made = layer()
    made.merge(undo=None)
    with pytest.raises(MergeError, match="without an undo"):
        made.unmerge()


def test_there_is_no_undo_but_a_copy() -> None:
    made = layer().bfloat16()
    before = made.base_layer.weight.detach().clone()
    for undo in ("residual", "bits"):
        with pytest.raises(MergeError, match=f"undo='{undo}' does not exist; .*use undo='copy'"):
            made.merge(undo=undo)  # type: ignore[arg-type]
    assert torch.equal(made.base_layer.weight, before) and not made.merged


def test_merging_twice_adds_once() -> None:
    made, x = layer(), torch.randn(3, 6)
    expected = made(x)
    made.merge()
    made.merge()
    assert made.merged_adapters == ["a"]
    assert_close(made(x), expected)
    made.unmerge()
    made.unmerge()
    assert torch.equal(made(x), expected)


@pytest.mark.parametrize("merged", [False, True])
def test_a_failed_safe_merge_changes_nothing(merged: bool) -> None:
    made = layer()
    wrap(made, LoraConfig(r=2, lora_alpha=6), "b")
    train(made, "b", 5)
    made.set_adapter(["a", "b"])
    if merged:
        made.merge(adapter_names=["a"])
    before = made.base_layer.weight.clone()
    with torch.no_grad():
        made.lora_B["b"].weight[0, 0] = float("nan")
    with pytest.raises(MergeError):
        made.merge(safe_merge=True)
    assert torch.equal(made.base_layer.weight, before)
    assert made.merged_adapters == (["a"] if merged else [])


def test_dropout_acts_in_training_only_and_on_the_branch_only() -> None:
    made, x = layer(lora_dropout=0.5), torch.randn(64, 6)
    made.eval()
    base, kept = made.base_layer(x), made(x)
    made.train()
    torch.manual_seed(0)
    dropped = made(x)
    torch.manual_seed(0)
    assert torch.equal(made(x), dropped)
    assert not torch.allclose(dropped, kept)
    with torch.no_grad():
        draws = torch.stack([made(x) - base for _ in range(2000)])
    # The mean of 2000 draws has 1/45 of their spread; six times that, for each of 320 elements.
    error = (draws.mean(0) - (kept - base).detach()).abs() / (draws.std(0) + 1e-6)
    assert float(error.max()) < 6 / 45


def test_layers_train_alone_and_merge_alone() -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 5)
    before = copy.deepcopy(base)
    target = nn.Linear(6, 5)
    made = wrap(base, LoraConfig(r=5, lora_alpha=10))
    optimizer = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], lr=0.05)
    x = torch.randn(64, 6)
    first = last = 0.0
    for step in range(200):
        loss = (made(x) - target(x).detach()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        first, last = (loss.item(), loss.item()) if step == 0 else (first, loss.item())
    assert last < first / 4
    assert torch.equal(base.weight, before.weight) and torch.equal(base.bias, before.bias)
    expected = made(x)
    made.merge()
    assert_close(base(x), expected)


def test_autocast_gives_what_it_gives_the_base() -> None:
    made, x = layer(), torch.randn(3, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = made(x)
        assert out.dtype == made.base_layer(x).dtype == torch.bfloat16
    assert_close(out, made(x))


def test_float32_factors_beside_16_bit_weights() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        config = LoraConfig(r=2, lora_alpha=6)
        assert wrap(nn.Linear(6, 5).to(dtype), config).lora_A["default"].weight.dtype == torch.float32
        kept = wrap(nn.Linear(6, 5).to(dtype), config, autocast_adapter_dtype=False)
        assert kept.lora_A["default"].weight.dtype == dtype
        assert kept(torch.randn(2, 6, dtype=dtype)).dtype == dtype
    assert wrap(nn.Linear(6, 5).double(), config).lora_A["default"].weight.dtype == torch.float64
