"""The order of B in a stack, told from trained factors; the full study is benchmarks/expert_layouts.py."""

from __future__ import annotations

import pytest
import torch

from benchmarks.expert_layouts import in_order, told, trained
from veneer.errors import AdapterFileError


@pytest.mark.parametrize("layout", ["peft", "unsloth", "peft-0.18", "megatron-bridge-stacks"])
def test_trained_adapters(layout: str) -> None:
    """The turned ones are told by shapes, and by who wrote the configuration."""
    config, tensors = trained(1, experts=8, r=8)
    found = told(config, in_order(tensors, 8, layout))
    if layout == "peft-0.18":  # nothing says here that PEFT wrote the configuration
        assert found.layout == "megatron-bridge-stacks"
    else:
        assert found.layout == layout
    assert not found.others


def test_without_training_it_is_ambiguous() -> None:
    """B is zero, or drawn at random: the two orders look alike, and PEFT's is the likelier one."""
    config, tensors = trained(1, experts=8, r=8)
    torch.manual_seed(0)
    for fill in (torch.zeros_like, torch.randn_like):
        found = told(config, {name: fill(t) if "lora_B" in name else t for name, t in tensors.items()})
        assert found.layout == "peft" and found.others == ("unsloth",) and not found.certain
        with pytest.raises(AdapterFileError, match=r"ambiguous, peft or unsloth: .*from_layout decides"):
            found.decided()


def test_with_rank_1_there_is_one_order() -> None:
    config, tensors = trained(1, experts=4, r=1)
    assert told(config, tensors).layout == "peft"


def test_one_stack_without_its_other_half() -> None:
    """The attention beside it says how wide the model is; without that nothing does."""
    config, tensors = trained(1, experts=8, r=8)
    config.target_parameters = ["experts.gate_up_proj"]
    lone = {n.replace(".base_layer", ""): t for n, t in tensors.items() if ".experts.lora" not in n}
    assert told(config, lone).layout == "peft"
    alone = {name: tensor for name, tensor in lone.items() if ".experts" in name}
    assert told(config, alone).others == ("peft-0.18",)
