"""Models whose forward is computed again in the backward, or can be."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Checkpointed(nn.Module):
    """Checkpoints by itself, where nothing can be given along."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """The linear, computed again in the backward."""
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def llama() -> nn.Module:
    """A tiny language model, whose layers transformers can checkpoint."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config)
