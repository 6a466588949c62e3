"""The reference's initialisations from weights and data, and ours: the same effective weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import veneer
from tests.interop import tiny
from tests.interop.reference import peft, quiet
from tests.tolerances import assert_close


def rows() -> list[dict[str, Tensor]]:
    """Batches of a language model: some padding, some masked labels."""
    made = []
    for i in range(3):
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(0, 50, (8, 12), generator=generator)
        mask, labels = torch.ones_like(ids), ids.clone()
        mask[0, 9:] = 0
        labels[:, :3] = -100
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva_gives_the_same_directions_and_ranks(rho: float) -> None:
    # The reference projects inputs at random onto 2·rho·r directions: exact where these are all there are.
    base = tiny.llama()
    given: dict[str, Any] = {"r": 8, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "up_proj"]}
    models = {}
    for library in (veneer, peft):
        config = library.LoraConfig(
            **given, init_lora_weights="eva", eva_config=library.EvaConfig(rho=rho, tau=0.8)
        )
        with quiet():
            model = library.get_peft_model(copy.deepcopy(base), config)
            library.initialize_lora_eva_weights(model, rows(), show_progress_bar=False)
        models[library] = model
    ranks: dict[Any, dict[str, int]] = {}
    for library, model in models.items():
        ranks[library] = {
            name: module.weight.shape[0]
            for name, module in model.named_modules()
            if name.endswith("lora_A.default")
        }
    ours, theirs = models[veneer], models[peft]
    for name in ranks[peft]:
        # Layers with the same input explain the same: which of two gets a rank more is arbitrary.
        assert abs(ranks[veneer][name] - ranks[peft][name]) <= (0 if rho == 1.0 else 1), name
        common = min(ranks[veneer][name], ranks[peft][name])
        pair = [m.get_submodule(name).weight[:common].detach() for m in (ours, theirs)]
        assert_close((pair[0] * pair[1]).sum(1).abs(), torch.ones(common))
    assert sum(ranks[veneer].values()) == sum(ranks[peft].values())
