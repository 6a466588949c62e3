"""Attention modules and bare parameters: the same files and outputs as the reference, in both directions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import veneer
from tests.interop.reference import (
    both,
    expect_same_model,
    expect_same_tensors,
    from_reference,
    output,
    peft,
    quiet,
    randomise,
    stored,
)
from tests.tolerances import BY_DTYPE, assert_close

FLOAT32 = BY_DTYPE[torch.float32]
EXPERTS = ["gate_up_proj", "down_proj"]


def agree(build: Callable[[], nn.Module], options: dict[str, Any], inputs: Any, place: Path) -> Any:
    """The same names and bits, outputs and gradients; and each library loads what the other wrote."""
    torch.manual_seed(0)
    base = build().eval()
    ours, theirs = both(lambda: base, options)
    randomise(ours)
    randomise(theirs)
    expect_same_model(ours, theirs)
    expected = output(ours, inputs)
    assert_close(expected, output(theirs, inputs), FLOAT32)
    assert not torch.allclose(expected, output(base, inputs))
    grads = []
    for model in (ours, theirs):
        result = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        (result if isinstance(result, Tensor) else result.logits).square().mean().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        # The reference counts the update of an attention's out-projection twice, its gradient once.
        assert_close(grad / 2 if ".out_proj." in name else grad, grads[1][name], FLOAT32)
    ours.save_pretrained(place / "ours")
    with quiet():
        theirs.save_pretrained(place / "theirs")
    expect_same_tensors(stored(place / "ours"), stored(place / "theirs"))
    with quiet():
        reread = from_reference(base, place / "ours")
    assert_close(output(reread, inputs), expected, FLOAT32)
    again = veneer.PeftModel.from_pretrained(copy.deepcopy(base), place / "theirs", is_trainable=True).eval()
    assert torch.equal(output(again, inputs), expected)
    assert_close(output(again.merge_and_unload(), inputs), expected, FLOAT32)
    return ours


class Attending(nn.Module):
    """An attention over something else."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4, **options)
        self.lin = nn.Linear(16, 16)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """x: (5, 3, 16) -> (5, 3, 16)."""
        return self.attn(self.lin(x), x.flip(0), x, **options)[0]


ATTENTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch-first": {"batch_first": True},
    "no-bias": {"bias": False},
    "added-bias": {"add_bias_kv": True},
    "added-both": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
}


@pytest.mark.parametrize("options", ATTENTIONS.values(), ids=ATTENTIONS.keys())
def test_multihead_attention(options: dict[str, Any], tmp_path: Path) -> None:
    lora = {"r": 4, "lora_alpha": 6, "target_modules": ["attn", "lin"]}
    ours = agree(lambda: Attending(**options), lora, torch.randn(5, 3, 16), tmp_path)
    assert "base_model.model.attn.base_layer.out_proj.lora_A.weight" in veneer.get_peft_model_state_dict(ours)


def test_multihead_attention_with_masks_and_weights() -> None:
    ours, theirs = both(Attending, {"r": 4, "lora_alpha": 6, "target_modules": ["attn"]})
    randomise(ours)
    randomise(theirs)
    mine, other = ours.base_model.model.attn, theirs.base_model.model.attn
    query, key = torch.randn(5, 3, 16), torch.randn(6, 3, 16)
    blocked, padding = torch.rand(5, 6) > 0.7, torch.rand(3, 6) > 0.8
    blocked[:, 0] = padding[:, 0] = False
    cases: list[dict[str, Any]] = [
        {"attn_mask": blocked, "key_padding_mask": padding},
        {"attn_mask": torch.randn(5, 6), "average_attn_weights": False},
        {"attn_mask": torch.randn(12, 5, 6), "need_weights": False},
        {"key_padding_mask": padding, "need_weights": False},
    ]
    with torch.no_grad():
        for options in cases:
            _expect_same(mine(query, key, key, **options), other(query, key, key, **options))
        _expect_same(mine(*[query[:, 0]] * 3), other(*[query[:, 0]] * 3))
        causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
        hinted = {"attn_mask": causal, "is_causal": True, "need_weights": False}
        _expect_same(mine(query, query, query, **hinted), other(query, query, query, **hinted))


def _expect_same(ours: tuple[Tensor, Tensor | None], theirs: tuple[Tensor, Tensor | None]) -> None:
    assert_close(ours[0], theirs[0], FLOAT32)
    assert (ours[1] is None) == (theirs[1] is None)
    if ours[1] is not None and theirs[1] is not None:
        assert_close(ours[1], theirs[1], FLOAT32)


def _sizes(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 31,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "head_dim": 8,
        **more,
    }


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**_sizes(num_local_experts=4, num_experts_per_tok=2)))


def qwen3_moe() -> nn.Module:
    more = _sizes(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**more))


def llama4() -> nn.Module:
    more = _sizes(num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=24)
    return Llama4ForCausalLM(Llama4TextConfig(**more, interleave_moe_layer_step=1))


def gpt_oss() -> nn.Module:
    return GptOssForCausalLM(GptOssConfig(**_sizes(num_local_experts=4, num_experts_per_tok=2)))


@pytest.mark.parametrize("targets", [["experts.gate_up_proj", "experts.down_proj"], ["down_proj"]])
@pytest.mark.parametrize("build", [mixtral, qwen3_moe, llama4, gpt_oss])
def test_experts(build: Callable[[], nn.Module], targets: list[str], tmp_path: Path) -> None:
    lora = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "target_parameters": targets}
    agree(build, lora, {"input_ids": torch.randint(3, 31, (2, 7))}, tmp_path)


@pytest.mark.parametrize("kind", ["eager", "batched_mm", "grouped_mm"])
def test_experts_computed_in_each_way_of_transformers(kind: str) -> None:
    lora = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj"],
        "target_parameters": ["gate_up_proj", "down_proj"],
    }
    for build in (mixtral, gpt_oss):
        ours, theirs = both(build, lora)
        randomise(ours)
        randomise(theirs)
        ours.config._experts_implementation = theirs.config._experts_implementation = kind
        ids = {"input_ids": torch.randint(3, 31, (2, 7))}
        assert_close(output(ours, ids), output(theirs, ids), FLOAT32)


def test_patterns_count_for_parameters(tmp_path: Path) -> None:
    lora = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": [],
        "target_parameters": ["gate_up_proj", "gate.weight"],
        "rank_pattern": {r".*\.gate_up_proj": 2},
        "alpha_pattern": {r".*\.gate_up_proj": 5},
        "use_rslora": True,
    }
    ours = agree(mixtral, lora, {"input_ids": torch.randint(3, 31, (2, 7))}, tmp_path)
    ranks = {path: layer.r["default"] for path, layer in ours.base_model.layers().items()}
    assert ranks["model.layers.0.mlp.experts"] == 2 and ranks["model.layers.0.mlp.gate"] == 4


def test_two_adapters_of_the_same_parameters(tmp_path: Path) -> None:
    lora = {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["q_proj"],
        "target_parameters": ["gate_up_proj", "down_proj"],
    }
    base = mixtral().eval()
    ours, theirs = both(lambda: base, lora)
    ours.add_adapter("other", veneer.LoraConfig(**lora | {"r": 3}))
    with quiet():
        theirs.add_adapter("other", peft.LoraConfig(**lora | {"r": 3}))
    ids = {"input_ids": torch.randint(3, 31, (2, 7))}
    for name in ("default", "other"):
        ours.set_adapter(name)
        theirs.set_adapter(name)
        randomise(ours)
        randomise(theirs)
        assert_close(output(ours, ids), output(theirs, ids), FLOAT32)
    ours.set_adapter(["default", "other"])
    theirs.base_model.set_adapter(["default", "other"])
    assert_close(output(ours, ids), output(theirs, ids), FLOAT32)
