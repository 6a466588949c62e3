"""Families of tiny adapters, and their batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.laws.test_family import llama
from veneer import Family, LoraConfig

CONFIG = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, lora_dropout=0.1)


def text(seed: int = 0, rows: int = 2, tokens: int = 8) -> dict[str, Tensor]:
    ids = torch.randint(3, 64, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "labels": labels}


def family(*names: str, **options: Any) -> Family:
    made = Family(llama())
    for seed, name in enumerate(names):
        made.add(name, CONFIG, **{"learning_rate": 1e-2, "seed": seed, **options})
    return made


def weights(made: Family, name: str) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in made.parameters(name)]
