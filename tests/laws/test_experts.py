"""Rows of one batch through different adapters of a mixture's experts: the same as each adapter by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.routing import BASE

NAMES = ["small", "large", BASE, "attention", "large"]
IDS = torch.randint(3, 31, (5, 6), generator=torch.Generator().manual_seed(0))
SHARED = r".*\.(q_proj|shared_expert\w*|shared_expert\w*\.\w+)"
#: What the models' configurations add to the sizes below; each has four experts, of which a token takes two.
MODELS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 12, "head_dim": 8},
    "Qwen2Moe": {
        "num_experts": 4, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20,
    },
    "GptOss": {"num_local_experts": 4, "head_dim": 8},
    "DeepseekV3": {
        "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 12, "first_k_dense_replace": 0,
        "n_group": 2, "topk_group": 1, "q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 2,
    },
    "Ernie4_5_Moe": {
        "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 12, "moe_num_shared_experts": 1,
        "moe_layer_start_index": 0,
    },
    # Its experts get every token, one copy after the other.
    "Llama4": {"num_local_experts": 4, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 1},
}  # fmt: skip
SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def mixture(kind: str) -> nn.Module:
    torch.manual_seed(0)
    text = getattr(transformers, f"{kind}TextConfig", None) or getattr(transformers, f"{kind}Config")
    config = text(**SIZES | MODELS[kind], initializer_range=0.3)
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config)
    return model.eval()


def adapted(base: nn.Module) -> PeftModel:
    """Two adapters of all experts and what chooses them, and one of the attention alone."""
    routers = [n for n, _ in base.named_parameters() if n.endswith((".gate.weight", ".router.weight"))]
    stacks = ["gate_up_proj", "down_proj", *routers]
    targets = {"small": (2, stacks, SHARED), "large": (3, stacks, SHARED), "attention": (2, None, ["q_proj"])}
    model = None
    for name, (r, parameters, modules) in targets.items():
        config = LoraConfig(
            r=r, lora_alpha=5, target_modules=modules, target_parameters=parameters, init_lora_weights=False
        )
        if model is None:
            model = get_peft_model(base, config, name)
        else:
            model.add_adapter(name, config)
    assert model is not None
    return model.eval()


def alone(model: PeftModel, name: str, ids: Tensor) -> Tensor:
    if name == BASE:
        with model.disable_adapter():
            return model(input_ids=ids).logits  # type: ignore[no-any-return]
    model.set_adapter(name)
    return model(input_ids=ids).logits  # type: ignore[no-any-return]


def own_rows() -> Iterator[tuple[str, list[int]]]:
    for name in dict.fromkeys(NAMES):
        yield name, [row for row, owner in enumerate(NAMES) if owner == name]


def assert_near(found: Tensor, wanted: Tensor) -> None:
    """As far as sums of other sizes are in float32."""
    assert wanted.norm() > 0 and (found - wanted).norm() <= 1e-5 * wanted.norm()


WAYS = [
    *((kind, "eager") for kind in MODELS),
    *((kind, way) for kind in ("Mixtral", "GptOss", "Qwen2Moe") for way in ("batched_mm", "grouped_mm")),
]


@pytest.mark.parametrize(("kind", "way"), WAYS)
def test_each_row_is_what_its_adapter_gives(kind: str, way: str) -> None:
    """Outputs and gradients; some experts get no token of some adapter."""
    model = adapted(mixture(kind))
    model.config._experts_implementation = way
    factors = {n: list(model.base_model.index.parameters(n)) for n in NAMES if n != BASE}
    every = [factor.requires_grad_(True) for own in factors.values() for factor in own]
    mixed = model(input_ids=IDS, adapter_names=NAMES).logits
    direction = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(1))
    gradients = dict(zip(every, torch.autograd.grad((mixed * direction).sum(), every), strict=True))
    for name, rows in own_rows():
        expected = alone(model, name, IDS[rows])
        assert_near(mixed[rows], expected)
        if name != BASE:
            wanted = torch.autograd.grad((expected * direction[rows]).sum(), factors[name])
            whole = torch.cat([gradient.flatten() for gradient in wanted])
            found = torch.cat([gradients[factor].flatten() for factor in factors[name]])
            assert_near(found, whole)


@pytest.mark.parametrize("kind", ["Qwen2Moe", "GptOss", "Llama4"])
def test_nothing_of_an_adapter_reaches_another(kind: str) -> None:
    """A NaN in its factors sends its tokens to other experts, and changes no bit of other rows."""
    model = adapted(mixture(kind))
    with torch.no_grad():
        before = model(input_ids=IDS, adapter_names=NAMES).logits
        for factor in model.base_model.index.parameters("large"):
            factor.fill_(torch.nan)
        after = model(input_ids=IDS, adapter_names=NAMES).logits
    others = [row for row, name in enumerate(NAMES) if name != "large"]
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before, after)


def test_rows_are_generated_for_with_beams() -> None:
    model = adapted(mixture("Qwen2Moe"))
    options: dict[str, Any] = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    mixed = model.generate(input_ids=IDS, adapter_names=NAMES, **options)
    for name, rows in own_rows():
        assert torch.equal(
            mixed[rows], model.generate(input_ids=IDS[rows], adapter_names=[name] * len(rows), **options)
        )


def test_a_checkpointed_mixture_knows_its_rows_again() -> None:
    model = adapted(mixture("Qwen2Moe")).train()
    model.activation_checkpointing_enable()
    factors = list(model.base_model.index.parameters("large"))
    plain = adapted(mixture("Qwen2Moe")).train()
    plain.load_state_dict(model.state_dict())
    for one in (model, plain):
        for factor in one.base_model.index.parameters("large"):
            factor.requires_grad_(True)
        one(input_ids=IDS, adapter_names=NAMES).logits.square().sum().backward()
    for mine, theirs in zip(factors, plain.base_model.index.parameters("large"), strict=True):
        assert mine.grad is not None and torch.equal(mine.grad, theirs.grad)
