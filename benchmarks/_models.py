"""The Llama-shaped models that benchmarks share, plain and with adapters of either library."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import torch
from torch import nn

#: Layer sizes by hidden size.
SIZES: dict[int, dict[str, int]] = {
    576: {"intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    1536: {"intermediate_size": 4096, "num_attention_heads": 24, "num_key_value_heads": 8},
    4096: {"intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
}
#: Every linear of such a model.
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(hidden: int, layers: int, dtype: torch.dtype, *, head: bool = False, vocabulary: int = 32) -> Any:
    """A model with random weights, the same at every call; without a head it gives hidden states."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        use_cache=head,
        attn_implementation="sdpa",
        **SIZES[hidden],
    )
    model: nn.Module = (LlamaForCausalLM if head else LlamaModel)(config)
    return model.to(dtype)


def library(name: str) -> ModuleType:
    """``"veneer"`` or ``"PEFT"``."""
    import importlib

    return importlib.import_module(name.lower())


def adapted(
    side: str, model: Any, *, r: int = 16, p: float = 0.0, adapter_name: str = "default", **options: Any
) -> Any:
    """The model with an adapter of one library on every linear, B not zero."""
    lora = library(side)
    torch.manual_seed(0)
    config = lora.LoraConfig(
        **{
            "r": r,
            "lora_alpha": 2 * r,
            "lora_dropout": p,
            "target_modules": LINEARS,
            "init_lora_weights": False,
            **options,
        }
    )
    return lora.get_peft_model(model, config, adapter_name)


def fresh(model: nn.Module) -> Any:
    """The same tensors in modules of their own, as untouched as those of a model that was just loaded."""
    twin = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    return twin.requires_grad_(True)
