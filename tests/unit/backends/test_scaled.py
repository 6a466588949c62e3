"""Weights that are codes with a scale beside them: computed with, never read, never written."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers.integrations.finegrained_fp8 import FP8Embedding, FP8Linear
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from tests.laws.cases import train
from tests.storages import coded
from tests.tolerances import assert_close
from veneer import (
    LoraConfig,
    MergeError,
    TargetError,
    get_peft_model,
    initialize_lora_eva_weights,
    preprocess_corda,
)
from veneer.backends import find, quantised
from veneer.backends.scaled import scale_of
from veneer.layers import wrap


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(16, 8)


def wide(module: nn.Module) -> nn.Module:
    """Codes of a type that looks dense."""
    return coded(module, torch.float16)


def dense_type(module: nn.Module) -> nn.Module:
    """A plain linear that a hook computes for, as compressed-tensors leaves one: no class tells."""
    plain = linear()
    plain.weight = nn.Parameter(module.weight.detach(), requires_grad=False)
    plain.register_buffer("weight_scale", module.weight_scale_inv.detach())
    scale = plain.weight_scale

    def forward(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, plain.weight.to(x.dtype) * scale, plain.bias)

    plain.forward = forward  # type: ignore[method-assign]
    return plain


MAKES = {
    "FP8Linear": lambda: FP8Linear(16, 8),
    "a float8 weight": lambda: coded(linear()),
    "a scale beside it": lambda: wide(linear()),
    "float8 in a plain linear": lambda: dense_type(coded(linear())),
    "a scale beside a plain linear's": lambda: dense_type(wide(linear())),
    "offloaded": lambda: cpu_offload(nn.Sequential(coded(linear())), execution_device="cpu")[0],
}
each = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)


@each
def test_an_adapter_is_never_merged_into_codes(make) -> None:
    model = get_peft_model(
        nn.Sequential(make()), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    )
    layer = model.base_model.model[0]
    before = {name: t.clone() for name, t in layer.base_layer.state_dict().items() if not t.is_meta}
    for call in (model.merge_adapter, model.merge_and_unload, layer.merge):
        with pytest.raises(MergeError, match=r"weight_scale.* 16-bit weights|16-bit weights"):
            call()
    with pytest.raises(MergeError, match="cannot be dequantised"):
        model.merge_and_unload(dequantize=True)
    after = layer.base_layer.state_dict()
    for name, tensor in before.items():
        assert torch.equal(after[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


@each
@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        *({"init_lora_weights": name} for name in ("pissa", "olora", "corda", "lora_ga", "loftq")),
    ],
    ids=lambda options: str(next(iter(options.values()))),
)
def test_what_reads_the_weight_is_refused(make, options) -> None:
    model = nn.Sequential(make())
    with pytest.raises(TargetError, match=r"fp8|a code with a scale"):
        get_peft_model(model, LoraConfig(r=2, target_modules=["0"], **options))
    assert list(model._modules) == ["0"] and not isinstance(model[0], nn.Sequential)


@pytest.mark.parametrize("make", [coded, wide])
def test_measuring_for_what_reads_the_weight_is_refused(make) -> None:
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="corda")
    with pytest.raises(TargetError, match=r"fp8|a code with a scale"):
        preprocess_corda(nn.Sequential(make(linear())), config, run_model=lambda: None)


@pytest.mark.parametrize("make", [coded, wide, lambda m: dense_type(coded(m))])
def test_plain_lora_goes_on_beside_codes(make) -> None:
    base = make(linear())
    expected, x = copy.deepcopy(base), torch.randn(3, 16)
    layer = wrap(base, LoraConfig(r=2, lora_alpha=6))
    assert torch.equal(layer(x), expected(x))
    assert layer.lora_A["default"].weight.dtype == torch.float32
    train(layer, "default")
    with torch.no_grad():
        b, a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    assert_close(layer(x), expected(x) + 3.0 * x @ a.T @ b.T)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), expected(x))


def test_eva_measures_inputs_and_so_serves_codes() -> None:
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="eva")
    model = get_peft_model(nn.Sequential(coded(linear())), config, low_cpu_mem_usage=True)
    initialize_lora_eva_weights(
        model,
        [torch.randn(32, 16) for _ in range(8)],
        forward_fn=lambda m, x: m(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
    )
    assert model.base_model.model[0].lora_A["default"].weight.any()


def test_the_scale_of_an_embeddings_codes_is_not_the_updates() -> None:
    base = FP8Embedding(12, 6)
    with torch.no_grad():
        base.weight.copy_(torch.randn(12, 6).to(base.weight.dtype))
        base.weight_scale.fill_(0.25)
    expected, x = copy.deepcopy(base), torch.tensor([1, 5, 5])
    layer = wrap(base, LoraConfig(r=2, lora_alpha=6, init_lora_weights=False))
    a, b, _ = layer.factors("default")
    assert_close(layer(x), expected(x) + 3.0 * a.T[x] @ b.T)
    with pytest.raises(MergeError, match="weight_scale"):
        layer.merge()


@pytest.mark.parametrize("make", [coded, wide])
@pytest.mark.parametrize("case", ["conv", "embedding"])
def test_the_scale_of_the_codes_of_any_layer_is_not_the_updates(make, case) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 4, 2) if case == "conv" else nn.Embedding(12, 6)
    x = torch.randn(2, 3, 4, 4) if case == "conv" else torch.tensor([1, 5, 5])
    dense = wrap(copy.deepcopy(plain), LoraConfig(r=2, lora_alpha=6))
    layer = wrap(make(copy.deepcopy(plain)), LoraConfig(r=2, lora_alpha=6))
    train(dense, "default")
    with torch.no_grad():
        for mine, other in zip(
            layer.adapter_parameters("default"), dense.adapter_parameters("default"), strict=True
        ):
            mine.copy_(other)
        assert_close(layer(x) - layer.base_layer(x), dense(x) - dense.base_layer(x))


def test_a_padding_subclass_of_a_convolution_is_still_one_graph() -> None:
    class Padded(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(nn.functional.pad(x, (1, 0, 1, 0)))

    layer, x = wrap(Padded(3, 4, 2), LoraConfig(r=2, init_lora_weights=False)), torch.randn(2, 3, 4, 4)
    assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


def test_rows_of_codes_are_not_trained() -> None:
    model = nn.Module()
    model.embed, model.head = FP8Embedding(12, 6), nn.Linear(6, 6)
    model.get_input_embeddings = lambda: model.embed
    with pytest.raises(TargetError, match="its rows cannot be read: they are stored as fp8"):
        get_peft_model(
            model, LoraConfig(r=2, target_modules=["head"], trainable_token_indices={"embed": [1]})
        )


def test_what_an_embedding_multiplies_its_rows_with_is_no_scale_of_codes() -> None:
    base = Gemma3TextScaledWordEmbedding(12, 6, 0, embed_scale=2.0)
    assert "embed_scale" in dict(base.named_buffers()) and find(base).name == "dense"
    layer = wrap(base, LoraConfig(r=2, lora_alpha=6, init_lora_weights=False))
    x = torch.tensor([1, 5, 5])
    expected = layer(x)
    layer.merge()
    assert_close(layer(x), expected)


def test_a_vector_with_a_scale_beside_it_is_dense() -> None:
    norm = nn.LayerNorm(4)
    norm.register_buffer("scale", torch.ones(1))
    assert find(norm).name == "dense" and quantised(norm) is None


@pytest.mark.parametrize(
    ("name", "names", "scale"),
    [
        ("weight", ["weight", "bias"], None),
        ("weight", ["weight", "weight_scale_inv"], "weight_scale_inv"),
        ("weight", ["weight", "input_scale"], "input_scale"),
        ("weight", ["weight", "scales"], "scales"),
        ("weight", ["weight", "other", "other_scale"], None),
        ("weight", ["weight", "embed_scale"], None),
        ("up", ["up", "down", "down_scale", "per_expert_scale"], None),
        ("down", ["up", "down", "down_scale", "per_expert_scale"], "down_scale"),
    ],
)
def test_whose_scale_a_scale_is(name: str, names: list[str], scale: str | None) -> None:
    assert scale_of(name, names) == scale
