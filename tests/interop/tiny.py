"""Small models for fresh processes: imported there by path, so nothing of the test suite comes along."""

from __future__ import annotations

from typing import Any

import torch

torch.set_num_threads(1)

X = torch.arange(12).reshape(2, 6)


def llama(layers: int = 2, hidden: int = 16) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=hidden,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,  # so that the blocks matter, and an adapter in them can learn in some steps
    )
    return LlamaForCausalLM(config).eval()


def opt() -> Any:
    """Its embeddings are narrower than its blocks: projections stand between them, and the head is tied."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=50,
        hidden_size=16,
        word_embed_proj_dim=8,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        do_layer_norm_before=False,
    )
    return OPTForCausalLM(config).eval()


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1
    )
    return GPT2LMHeadModel(config).eval()


def classifier() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


def shake(model: Any) -> None:
    """Give everything that an adapter trains values that show in the output."""
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)


def rows(count: int = 24) -> list[dict[str, torch.Tensor]]:
    """Rows whose labels can be learnt: each continues by counting."""
    made = []
    for start in range(count):
        ids = (torch.arange(8) + 3 * start) % 50
        made.append({"input_ids": ids, "labels": ids})
    return made
