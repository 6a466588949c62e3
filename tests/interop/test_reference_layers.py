"""Every geometry of every layer type against the reference, and where that is broken, against dense W + ΔW.

`BROKEN_FORWARD` and `BROKEN_MERGE` name what the reference (0.21.2) computes wrongly or not at all, with the
reason; the tests check that it is so, and hold our layer to the dense weight there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.efficientnet.modeling_efficientnet import EfficientNetDepthwiseConv2d
from transformers.pytorch_utils import Conv1D

from tests.interop.reference import expect_same_model, output, peft, quiet, randomise
from tests.tolerances import assert_close
from veneer import LoraConfig, PeftModel, get_peft_model

R = 4
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_bias": {"bias": False},
    "1x1": {"kernel_size": 1},
    "even_kernel": {"kernel_size": 2},
    "stride": {"stride": 2},
    "padding": {"padding": 2},
    "padding_same": {"padding": "same"},
    "padding_valid": {"padding": "valid"},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4, "out_channels": 4},
    "dilation": {"dilation": 2},
    "dilation_and_padding": {"dilation": 2, "padding": 2},
    "dilation_and_padding_same": {"dilation": 2, "padding": "same"},
    "dilation_1x1": {"dilation": 2, "kernel_size": 1},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "circular_same": {"padding": "same", "padding_mode": "circular"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate"},
    "everything": {"stride": 2, "dilation": 2, "groups": 2, "padding": 2, "padding_mode": "circular"},
}

_NO_DILATION = "A is made without the base's dilation: shapes differ, or the branch sees other pixels"
_NO_MODE = "A is made without the base's padding mode: the branch pads with zeros"
BROKEN_FORWARD = {
    "dilation": _NO_DILATION,
    "dilation_and_padding": _NO_DILATION,
    "dilation_and_padding_same": _NO_DILATION,
    "circular": _NO_MODE,
    "circular_same": _NO_MODE,
    "reflect": _NO_MODE,
    "replicate": _NO_MODE,
    "everything": _NO_DILATION,
}
_NO_GROUPS = "merging a convolution with groups is not implemented"
BROKEN_MERGE: dict[tuple[str, int | None], str] = {
    ("groups", None): _NO_GROUPS,
    ("depthwise", None): _NO_GROUPS,
    ("everything", None): _NO_GROUPS,
    ("1x1", 3): "a 1×1×1 kernel is taken for a 1×1 one: the update gets a wrong shape",
    ("dilation_1x1", 3): "a 1×1×1 kernel is taken for a 1×1 one: the update gets a wrong shape",
}


def pair(base: nn.Module, **options: Any) -> tuple[PeftModel, Any]:
    """Both libraries on the same single layer, with the same random factors."""
    given = {"r": R, "lora_alpha": 6, "target_modules": ["0"]} | options
    ours = get_peft_model(copy.deepcopy(base), LoraConfig(**given)).eval()
    with quiet():
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**given)).eval()
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def dense(base: nn.Module, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """``(W + s·ΔW) ∗ x`` in plain torch, in float64: W and ΔW without groups, padding done by hand."""
    conv: Any = base
    n, groups = len(conv.kernel_size), conv.groups
    full = torch.zeros(conv.out_channels, conv.in_channels, *conv.kernel_size, dtype=torch.float64)
    rows, cols = conv.out_channels // groups, conv.in_channels // groups
    each = R // groups
    for g in range(groups):
        out = slice(g * rows, (g + 1) * rows)
        full[out, g * cols : (g + 1) * cols] += conv.weight[out].double()
        full[out] += (
            6 / R * torch.einsum("or,r...->o...", b.flatten(1)[out].double(), a.double()[g * each :][:each])
        )
    bias = None if conv.bias is None else conv.bias.double()
    sizes = conv._reversed_padding_repeated_twice
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return CONVOLVE[n](F.pad(x.double(), sizes, mode=mode), full, bias, conv.stride, 0, conv.dilation).float()


@pytest.mark.parametrize("dimensions", CONVOLUTIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolution(geometry: str, dimensions: int) -> None:
    sizes = {"in_channels": 4, "out_channels": 6, "kernel_size": 3} | GEOMETRIES[geometry]
    base = nn.Sequential(CONVOLUTIONS[dimensions](**sizes)).eval()
    x = torch.randn(2, 4, *(9, 8, 7)[:dimensions])
    ours, theirs = pair(base)
    layer: Any = ours.get_base_model()[0]
    a, b, _ = layer.factors("default")
    expected = dense(base[0], a.detach(), b.detach(), x)
    assert_close(output(ours, x), expected)

    if geometry not in BROKEN_FORWARD:
        assert_close(output(ours, x), output(theirs, x))
    else:
        try:
            answer = output(theirs, x)
        except RuntimeError:
            answer = None
        assert answer is None or (answer - expected).abs().max() > 0.1, "the reference has been repaired"

    assert_close(output(ours.merge_and_unload(), x), expected)
    if not {(geometry, None), (geometry, dimensions)} & set(BROKEN_MERGE):
        merged = theirs.merge_and_unload()
        assert_close(output(merged, x), expected)
        assert_close(ours.get_base_model()[0].weight, merged[0].weight)
    else:
        with pytest.raises((NotImplementedError, RuntimeError)):
            theirs.merge_and_unload()


def test_the_tables_name_only_what_is_tested() -> None:
    assert set(BROKEN_FORWARD) <= set(GEOMETRIES)
    assert {name for name, _ in BROKEN_MERGE} <= set(GEOMETRIES)


@pytest.mark.parametrize("geometry", ["plain", "stride", "groups", "padding"])
def test_convolution_with_a_bias_of_b(geometry: str) -> None:
    base = nn.Sequential(
        nn.Conv2d(**({"in_channels": 4, "out_channels": 6, "kernel_size": 3} | GEOMETRIES[geometry]))
    )
    ours, theirs = pair(base, lora_bias=True)
    x = torch.randn(2, 4, 7, 8)
    assert_close(output(ours, x), output(theirs, x))


def test_loftq_of_a_convolution_fails_in_the_reference_only() -> None:
    """Its factorisation takes matrices; ours takes the kernel as one, (out, in·k…)."""
    base = nn.Sequential(nn.Conv2d(4, 6, 3))
    options = {"r": R, "lora_alpha": 6, "target_modules": ["0"], "init_lora_weights": "loftq"}
    with pytest.raises((TypeError, AssertionError)):
        peft.get_peft_model(
            copy.deepcopy(base), peft.LoraConfig(**options, loftq_config=peft.LoftQConfig(loftq_bits=4))
        )
    ours = get_peft_model(copy.deepcopy(base), LoraConfig(**options, loftq_config={"loftq_bits": 4}))
    layer: Any = ours.get_base_model()[0]
    rounded = layer.base_layer.weight
    error = (rounded + layer.get_delta_weight("default") - base[0].weight).norm()
    assert 0 < error < (rounded - base[0].weight).norm()


def test_groups_that_do_not_divide_the_rank_are_refused_by_both() -> None:
    base = nn.Sequential(nn.Conv2d(4, 8, 3, groups=4))
    with pytest.raises(ValueError, match="groups"), quiet():
        peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=6, target_modules=["0"]))
    with pytest.raises(ValueError, match="4 groups do not divide the rank, r=6"):
        get_peft_model(base, LoraConfig(r=6, target_modules=["0"]))


class OwnConstructor(nn.Conv2d):
    """A convolution that is not made from (in, out, kernel, stride, padding)."""

    def __init__(self, *, width: int) -> None:
        super().__init__(width, width, 3, padding=1)


SUBCLASSES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "own_constructor": (
        lambda: OwnConstructor(width=4),
        "A is made by calling the subclass, with other arguments",
    ),
    "efficientnet_depthwise": (
        lambda: EfficientNetDepthwiseConv2d(4, kernel_size=3, padding=1, bias=False),
        "A is made by calling the subclass: (in, r, kernel) is read as (in, multiplier, kernel)",
    ),
}


@pytest.mark.parametrize("name", SUBCLASSES)
def test_subclasses_with_their_own_constructor_break_the_reference(name: str) -> None:
    build, _reason = SUBCLASSES[name]
    base = nn.Sequential(build())
    x = torch.randn(2, 4, 6, 6)
    with pytest.raises((TypeError, RuntimeError)), quiet():
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=R, target_modules=["0"]))
        output(theirs, x)
    ours = randomise(get_peft_model(copy.deepcopy(base), LoraConfig(r=R, lora_alpha=6, target_modules=["0"])))
    a, b, _ = ours.get_base_model()[0].factors("default")
    expected = dense(base[0], a.detach(), b.detach(), x)
    assert_close(output(ours, x), expected)
    assert_close(output(ours.merge_and_unload(), x), expected)


# -- linears ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 2, 2, 5), (0, 5), (2, 0, 5)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_linear_inputs(shape: tuple[int, ...], bias: bool) -> None:
    ours, theirs = pair(nn.Sequential(nn.Linear(5, 7, bias=bias)))
    x = torch.randn(shape)
    assert_close(output(ours, x), output(theirs, x))
    x = torch.randn(*shape[:-1], 10)[..., ::2]
    assert_close(output(ours, x), output(theirs, x))


@pytest.mark.parametrize("given", [True, False], ids=["fan_in_fan_out", "not_said"])
def test_transposed_linear(given: bool) -> None:
    """Both find out for themselves how transformers' Conv1D lies, and both write it down."""
    base = nn.Sequential(Conv1D(7, 5))
    ours, theirs = pair(base, fan_in_fan_out=given)
    expect_same_model(ours, theirs)
    assert ours.peft_config["default"].fan_in_fan_out is theirs.peft_config["default"].fan_in_fan_out is True
    x = torch.randn(3, 5)
    assert_close(output(ours, x), output(theirs, x))
    assert_close(ours.merge_and_unload()[0].weight, theirs.merge_and_unload()[0].weight)


def test_fan_in_fan_out_of_a_plain_linear_is_ignored_by_both_and_said() -> None:
    base = nn.Sequential(nn.Linear(5, 7))
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        ours = get_peft_model(copy.deepcopy(base), LoraConfig(r=R, target_modules=["0"], fan_in_fan_out=True))
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        theirs = peft.get_peft_model(base, peft.LoraConfig(r=R, target_modules=["0"], fan_in_fan_out=True))
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 5)
    assert_close(output(ours, x), output(theirs, x))
    assert ours.peft_config["default"].fan_in_fan_out is theirs.peft_config["default"].fan_in_fan_out is False


@pytest.mark.parametrize("order", ["linear_first", "transposed_first"])
def test_linear_and_transposed_linear_in_one_model(order: str, tmp_path: Path) -> None:
    """One flag in the file for both; each library looks at the module instead."""
    layers = [nn.Linear(6, 6), Conv1D(6, 6)]
    base = nn.Sequential(*(layers if order == "linear_first" else layers[::-1])).eval()
    ours, theirs = pair(base, target_modules=["0", "1"])
    x = torch.randn(3, 6)
    expected = output(theirs, x)
    assert_close(output(ours, x), expected)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs").eval()
    with quiet():
        there = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
    for model in (loaded, there):
        expect_same_model(model, theirs)
        assert_close(output(model, x), expected)
    merged, its = loaded.merge_and_unload(), theirs.merge_and_unload()
    for mine, reference in zip(merged, its, strict=True):
        assert_close(mine.weight, reference.weight)


# -- tables ----------------------------------------------------------------------------------------------

TABLES: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding_idx": {"padding_idx": 2},
    "max_norm": {"max_norm": 0.3},
    "norm_type": {"max_norm": 0.3, "norm_type": 1.0},
    "scale_grad_by_freq": {"scale_grad_by_freq": True},
    "sparse": {"sparse": True},
}

#: What the reference's own embedding does with its factor A, and ours does not.
BROKEN_TABLES = {
    "max_norm": "its lookup renormalises the rows of A in place: a forward changes the adapter",
    "norm_type": "the same",
}
BROKEN_TABLE_GRADIENTS = {
    "sparse": "backward fails: torch cannot transpose the sparse gradient of A's columns"
}


@pytest.mark.parametrize("name", TABLES)
def test_table(name: str) -> None:
    base = nn.Sequential(nn.Embedding(9, 6, **TABLES[name]))
    ours, theirs = pair(base)
    ids = torch.tensor([[1, 2, 2, 8], [0, 2, 1, 1]])
    before = {n: p.detach().clone() for n, p in theirs.named_parameters() if "lora" in n}
    answer = output(theirs, ids)
    written = any(not torch.equal(p, before[n]) for n, p in theirs.named_parameters() if "lora" in n)
    assert written == (name in BROKEN_TABLES)
    if name not in BROKEN_TABLES:
        assert_close(output(ours, ids), answer)
    a, b, _ = ours.get_base_model()[0].factors("default")
    expected = base(ids) + 6 / R * (b @ a).T[ids]
    assert_close(output(ours, ids), expected.detach())
    ours(ids).square().sum().backward()
    if name in BROKEN_TABLES:
        return
    if name in BROKEN_TABLE_GRADIENTS:
        with pytest.raises(RuntimeError, match="sparse"):
            theirs(ids).square().sum().backward()
        # The same lookup with a gradient that is dense.
        theirs.base_model.model[0].base_layer.sparse = False
        theirs.zero_grad()
    theirs(ids).square().sum().backward()
    theirs_grads = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    for n, p in ours.named_parameters():
        if p.requires_grad:
            assert p.grad is not None
            assert_close(p.grad, theirs_grads[n])


# -- starts ----------------------------------------------------------------------------------------------

STARTS = {
    "linear": lambda: nn.Linear(200, 150),
    "conv1d_of_transformers": lambda: Conv1D(150, 200),
    "embedding": lambda: nn.Embedding(200, 150),
    "conv2d": lambda: nn.Conv2d(60, 80, 3),
    "conv1d": lambda: nn.Conv1d(60, 80, 3),
    "conv3d": lambda: nn.Conv3d(20, 80, 3),
}


@pytest.mark.parametrize("start", [True, False, "gaussian"], ids=str)
@pytest.mark.parametrize("kind", STARTS)
def test_factors_start_from_the_same_distribution(kind: str, start: bool | str) -> None:
    """The same spread and kurtosis (which tells uniform from normal), and zeros where there are zeros."""
    options = {"r": 32, "init_lora_weights": start, "target_modules": ["0"]}
    base = nn.Sequential(STARTS[kind]())
    ours = get_peft_model(copy.deepcopy(base), LoraConfig(**options, lora_alpha=32))
    with quiet():
        theirs = peft.get_peft_model(base, peft.LoraConfig(**options, lora_alpha=32))
    found = {n: p.detach() for n, p in theirs.named_parameters() if "lora" in n}
    assert len(found) == 2
    for name, parameter in ours.named_parameters():
        if "lora" not in name:
            continue
        mine, its = parameter.detach(), found[name]
        if not its.any():
            assert not mine.any(), name
            continue
        # 2,560 numbers at least: a standard error of 2 % of the spread, and of 0.1 of a normal's kurtosis.
        assert abs(mine.std() / its.std() - 1) < 0.08, name
        assert abs(mine.mean() - its.mean()) < 0.12 * its.std(), name
        kurtosis = [float(((t - t.mean()) / t.std()).pow(4).mean()) for t in (mine, its)]
        assert abs(kurtosis[0] - kurtosis[1]) < 0.6, (name, kurtosis)
