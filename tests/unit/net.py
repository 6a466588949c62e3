"""A small net with an embedding and two linears, and an adapter on all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from veneer import LoraConfig, get_peft_model


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(10, 6)
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.second(self.first(self.table(ids)).relu()) * scale


IDS = torch.tensor([[1, 2, 3], [7, 8, 9]])


def adapted(rank: int = 2, alpha: int = 5, seed: int = 1, **options: Any) -> Any:
    given = {"target_modules": ["first", "second", "table"], **options}
    config = LoraConfig(r=rank, lora_alpha=alpha, **given)
    model = get_peft_model(Net(), config)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model.eval()
