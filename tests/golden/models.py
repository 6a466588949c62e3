"""The tiny models of the golden files, and the adapter of each. No library of adapters is imported here.

A case's base weights lie beside its adapter, so that its values do not depend on a random number generator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.down(torch.tanh(self.up(x)))))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 6, padding_idx=0)
        self.out = nn.Linear(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.table(ids))


class Convolution(nn.Module):
    def __init__(self, dimensions: int) -> None:
        super().__init__()
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        self.first = kind(2, 6, kernel_size=3, stride=2, padding=1)
        self.second = kind(6, 4, kernel_size=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=20, n_positions=16))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            tie_word_embeddings=False,
        )
    )


def ids(high: int) -> Tensor:
    return torch.randint(0, high, (3, 5))


@dataclass(frozen=True)
class Case:
    """One golden adapter: a model, an input, and the configuration (always with lora_alpha other than r)."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    config: dict[str, Any]


def mlp(**config: Any) -> Case:
    return Case(
        Mlp,
        lambda: torch.randn(3, 5, 6),
        {"r": 4, "lora_alpha": 6, "target_modules": ["up", "down"]} | config,
    )


def convolution(dimensions: int) -> Case:
    config = {"r": 3, "lora_alpha": 5, "target_modules": ["first", "second"]}
    return Case(lambda: Convolution(dimensions), lambda: torch.randn(2, 2, *[7] * dimensions), config)


CASES: dict[str, Case] = {
    "linear_patterns": mlp(rank_pattern={"down": 2}, alpha_pattern={"^up": 7}),
    "linear_regex": mlp(target_modules=r"up|head"),
    "rslora": mlp(use_rslora=True),
    "lora_bias": mlp(target_modules=["up", "head"], lora_bias=True),
    "bias_lora_only": mlp(bias="lora_only"),
    "bias_all": mlp(bias="all"),
    "modules_to_save": mlp(modules_to_save=["head", "norm"]),
    "rank_above_width": mlp(r=32),
    "embedding": Case(Words, lambda: ids(12), {"r": 3, "lora_alpha": 5, "target_modules": ["table", "out"]}),
    "conv1d": convolution(1),
    "conv2d": convolution(2),
    "conv3d": convolution(3),
    "gpt2_conv1d": Case(
        gpt2,
        lambda: ids(20),
        {
            "r": 4,
            "lora_alpha": 10,
            "target_modules": ["c_attn", "c_proj"],
            "task_type": "CAUSAL_LM",
            "fan_in_fan_out": True,
        },
    ),
    "llama_embedding": Case(
        llama,
        lambda: ids(20),
        {"r": 4, "lora_alpha": 10, "target_modules": ["embed_tokens", "q_proj"], "task_type": "CAUSAL_LM"},
    ),
}


def output(model: nn.Module, inputs: Tensor) -> Tensor:
    """What the model says to its inputs: logits or plain tensor."""
    result = model(inputs)
    return result if isinstance(result, Tensor) else result.logits
