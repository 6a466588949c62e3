"""Bases that are quantised: what is read, written, put back, replaced by ordinary weights, and refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.laws.cases import train
from tests.storages import (
    QUANTISED,
    UNMERGEABLE,
    AutoGPTQ,
    eight_bits,
    four_bits,
    half_quadratic,
    named,
    torchao,
    torchao_four_bits,
)
from tests.tolerances import STORED, assert_close
from veneer import (
    BaseMismatchError,
    LoraConfig,
    MergeError,
    PeftModel,
    TargetError,
    VeneerWarning,
    get_peft_model,
)
from veneer.backends import find, prepare_backward, quantised
from veneer.layers import wrap
from veneer.ops.sizes import stored_bytes

Make = Callable[[nn.Module], nn.Module]
STORAGES: dict[str, Make] = {
    "nf4": four_bits,
    "nf4-plain-scales": lambda m: four_bits(m, nested=False),
    "fp4": lambda m: four_bits(m, quant_type="fp4"),
    "nf4-in-bf16": lambda m: four_bits(m, compute_dtype=torch.bfloat16),
    "int8": eight_bits,
    "int8-outliers": lambda m: eight_bits(m, threshold=6.0),
    "int8-dense": lambda m: eight_bits(m, has_fp16_weights=True),
    "torchao-int8": torchao,
    "torchao-int4": torchao_four_bits,
}
each = pytest.mark.parametrize("make", STORAGES.values(), ids=STORAGES)
CONFIG = {"r": 4, "lora_alpha": 6}


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 32).to(dtype).requires_grad_(False).eval()


class Net(nn.Module):
    """Two linears in a storage, a norm between them, and a dense head."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        torch.manual_seed(0)
        up, down, self.norm, self.head = (
            nn.Linear(64, 128),
            nn.Linear(128, 64),
            nn.LayerNorm(128),
            nn.Linear(64, 8),
        )
        self.up, self.down = make(up), make(down)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., 64) -> (..., 8)."""
        return self.head(self.down(self.norm(self.up(x)).relu()))


def adapted(make: Make, **options: object) -> PeftModel:
    model = get_peft_model(Net(make), LoraConfig(**{**CONFIG, "target_modules": ["up", "down"], **options}))
    train(model, "default")
    return model.eval()


@each
def test_writing_rounds_and_keeps_the_old_tensors(make: Make) -> None:
    base = make(linear())
    prepare_backward(base)
    backend = find(base)
    before, kept = backend.read(base).clone(), backend.keep(base)
    assert backend.like(base).shape == before.shape == (32, 64)
    new = before.float() + 0.02 * torch.randn(32, 64)
    backend.write(base, new)
    assert (backend.read(base) - new).norm() <= 0.15 * new.norm()
    x = torch.randn(3, 64)
    dense = nn.functional.linear(x, backend.read(base).float(), base.bias.float())
    assert_close(base(x), dense, STORED["bitsandbytes-8bit"])
    backend.put_back(base, kept)
    assert torch.equal(backend.read(base), before)


@each
def test_a_merge_says_what_quantising_again_costs(make: Make) -> None:
    model = adapted(make)
    x, weights = torch.randn(5, 64), [find(m).read(m).clone() for m in (model.model.up.base_layer,)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = model.merge_adapter()
    coded = quantised(model.model.up.base_layer) is not None
    assert coded and report.requantised == ("up", "down")
    target = weights[0].float() + model.model.up.get_delta_weight("default")
    stored = find(model.model.up.base_layer).read(model.model.up.base_layer).float()
    delta = model.model.up.get_delta_weight("default")
    error = torch.tensor(report.error["up"])
    assert_close(error, (stored - target).norm() / delta.norm(), STORED["bitsandbytes-8bit"])
    assert "quantised again" in str(report)
    said = [str(w.message) for w in caught if issubclass(w.category, VeneerWarning)]
    assert bool(said) == (report.mean < 0.8) and all("dequantize=True" in text for text in said)
    model.unmerge_adapter()
    assert torch.equal(find(model.model.up.base_layer).read(model.model.up.base_layer), weights[0])
    assert model(x).isfinite().all()


@each
@pytest.mark.parametrize("dtype", [True, torch.bfloat16])
def test_merging_into_ordinary_weights(make: Make, dtype: bool | torch.dtype) -> None:
    model = adapted(make)
    x = torch.randn(5, 64)
    with torch.no_grad():
        expected = model(x)
    plain = model.merge_and_unload(dequantize=dtype)
    assert type(plain.up) is nn.Linear and type(plain.up.weight) is nn.Parameter
    wanted = torch.bfloat16 if dtype is not True else plain.up.weight.dtype
    assert plain.up.weight.dtype == wanted and wanted.is_floating_point
    with torch.no_grad():
        given = plain.to(torch.float32)(x)
    assert (given - expected).norm() <= 0.05 * expected.norm()
    assert not any(quantised(m) for m in plain.modules())


def test_modules_that_are_not_adapted_become_ordinary_too_and_all_or_nothing() -> None:
    model = adapted(four_bits, target_modules=["up"])
    model.merge_adapter()
    with pytest.raises(MergeError, match="unmerge_adapter"):
        model.merge_and_unload(dequantize=True)
    model.unmerge_adapter()
    kept, broken = model.model.down, model.model.up.lora_B["default"].weight
    broken.data[0, 0] = torch.inf
    with pytest.raises(MergeError):
        model.merge_and_unload(safe_merge=True, dequantize=True)
    assert model.model.down is kept and quantised(model.model.up.base_layer) is not None
    broken.data[0, 0] = 0.0
    assert type(model.merge_and_unload(dequantize=True).down) is nn.Linear


@pytest.mark.parametrize("kind", UNMERGEABLE)
def test_delegated_modules_refuse_to_merge_and_say_the_way_out(kind: str) -> None:
    model = adapted(QUANTISED[kind])
    x = torch.randn(2, 64)
    before = model(x)
    with pytest.raises(MergeError, match=UNMERGEABLE[kind]):
        model.merge_adapter()
    if kind == "hqq":
        assert_close(model.merge_and_unload(dequantize=True)(x), before)
        return
    with pytest.raises(MergeError, match="cannot be dequantised"):
        model.merge_and_unload(dequantize=True)
    assert torch.equal(model(x), before)
    base = model.model.up.base_layer
    with pytest.raises(TargetError, match="can be computed with, not read"):
        find(base).read(base)
    with pytest.raises(MergeError, match=UNMERGEABLE[kind]):
        find(base).write(base, torch.zeros(64, 64))
    stored = find(base).quantization
    with pytest.raises(TargetError, match=f"as {stored} stores it"):
        model.add_adapter("b", LoraConfig(**CONFIG, target_modules=["up"], use_dora=True))
    model.add_adapter("c", LoraConfig(**CONFIG, target_modules=["up"], alora_invocation_tokens=[1]))


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
@pytest.mark.parametrize("dora", [False, True])
def test_hqq_trains_comes_back_and_merges_into_plain_weights(bits: int, dora: bool, tmp_path: Path) -> None:
    make = partial(half_quadratic, bits=bits)
    model, x = adapted(make, use_dora=dora), torch.randn(5, 64)
    codes = model.model.up.base_layer.W_q.clone()
    model.train()(x).square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.requires_grad)
    assert torch.equal(model.model.up.base_layer.W_q, codes)
    expected = model.eval()(x).detach()
    assert not torch.allclose(expected, Net(make)(x))
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(Net(make), tmp_path).eval()(x), expected)
    assert_close(model.merge_and_unload(dequantize=True)(x), expected)


def test_sizes_under_the_older_names_are_found() -> None:
    base = named(AutoGPTQ, "auto_gptq.nn_modules.qlinear.qlinear_exllama.QuantLinear")(linear())
    layer = wrap(base, LoraConfig(**CONFIG))
    assert layer.lora_A["default"].weight.shape == (4, 64) and layer(torch.randn(2, 64)).shape == (2, 32)


@each
def test_adapters_travel_between_storages_without_alarm(make: Make, tmp_path: Path) -> None:
    model = adapted(make)
    model.save_pretrained(tmp_path / "coded")
    x = torch.randn(5, 64)
    back = PeftModel.from_pretrained(Net(make), tmp_path / "coded").eval()
    assert torch.equal(back(x), model(x))
    dense = PeftModel.from_pretrained(Net(lambda m: m), tmp_path / "coded").eval()
    assert (dense(x) - model(x)).norm() <= 0.3 * model(x).norm()
    dense.save_pretrained(tmp_path / "dense")
    again = PeftModel.from_pretrained(Net(make), tmp_path / "dense").eval()
    assert torch.equal(again(x), model(x))


def test_another_base_is_noticed_through_its_codes(tmp_path: Path) -> None:
    adapted(four_bits).save_pretrained(tmp_path)
    other = Net(lambda m: m)
    nn.init.normal_(other.up.weight), nn.init.normal_(other.down.weight)
    with pytest.raises(BaseMismatchError, match="another base model"):
        PeftModel.from_pretrained(other, tmp_path)


def test_codes_cannot_be_trained_whole() -> None:
    with pytest.raises(TargetError, match="codes cannot be trained"):
        get_peft_model(Net(four_bits), LoraConfig(**CONFIG, target_modules=["up"], modules_to_save=["down"]))


def test_gradients_pass_after_an_evaluation() -> None:
    # On CPUs with bfloat16 instructions an evaluation repacks 4-bit weights for a kernel without autograd.
    net = Net(four_bits)
    net(torch.randn(2, 64))
    model = get_peft_model(net, LoraConfig(**CONFIG, target_modules=["up"])).eval()
    with torch.no_grad():
        model(torch.randn(2, 64))
    model.train()
    model(torch.randn(2, 64)).sum().backward()
    assert model.model.up.lora_B["default"].weight.grad.abs().sum() > 0


def test_the_state_of_the_base_is_not_in_an_undo_and_copies_are_independent() -> None:
    model = adapted(four_bits)
    names = set(model.state_dict())
    model.merge_adapter()
    assert set(model.state_dict()) == names
    twin = copy.deepcopy(model)
    model.unmerge_adapter()
    x = torch.randn(2, 64)
    assert not torch.equal(twin(x), model(x))
    twin.unmerge_adapter()
    assert torch.equal(twin(x), model(x))


def test_bytes_count_codes_and_scales() -> None:
    assert stored_bytes(linear().weight) == 32 * 64 * 4
    assert stored_bytes(torchao(linear()).weight) == 32 * 64 + 32 * 4 + 32  # codes, scales, zero points
    nf4 = stored_bytes(four_bits(linear(), nested=False).weight)
    assert nf4 == 32 * 64 // 2 + 32 * 4 + 16 * 4  # codes, a scale for each 64 values, the code book
    assert stored_bytes(eight_bits(linear()).weight) == 32 * 64 + 32 * 4


def test_a_weight_that_torchao_cannot_dequantise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base = torchao(linear())

    def fails(self: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(type(base.weight), "dequantize", fails)
    with pytest.raises(MergeError, match=r"torchao cannot dequantise a .*: no kernel"):
        find(base).read(base)
