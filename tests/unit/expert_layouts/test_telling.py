"""The order of B in a stack, told from trained factors; the full study is benchmarks/expert_layouts.py."""

from __future__ import annotations

import pytest
import torch

from benchmarks.expert_layouts import in_order, told, trained
from veneer.errors import AdapterFileError
from veneer.expert_layouts.telling import by_names


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
    """B is drawn at random: the two orders look alike, and PEFT's is the likelier one."""
    config, tensors = trained(1, experts=8, r=8)
    torch.manual_seed(0)
    found = told(config, {n: torch.randn_like(t) if "lora_B" in n else t for n, t in tensors.items()})
    assert found.layout == "peft" and found.others == ("unsloth",) and not found.certain
    with pytest.raises(AdapterFileError, match=r"ambiguous, peft or unsloth: .*from_layout decides"):
        found.decided()
    assert found.remark() is None


def test_a_likely_layout_is_named_but_not_acted_upon() -> None:
    config, tensors = trained(1, experts=8, r=8)
    found = told(config, in_order(tensors, 8, "unsloth"))
    assert "are in the layout unsloth" in (found.remark() or "")
    assert "look like unsloth" in (found._replace(certain=False).remark() or "")


def test_a_b_of_zeros_is_the_same_in_every_order() -> None:
    config, tensors = trained(1, experts=8, r=8)
    found = told(config, {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in tensors.items()})
    assert found.decided() == "peft" and found.remark() is None


@pytest.mark.parametrize(
    ("version", "layout"),
    [("0.18.1", "peft-0.18"), ("0.19.0", "peft-0.18"), ("0.19.1", "peft"), ("0.21.2", "peft")],
)
def test_the_version_of_peft_tells_where_shapes_do_not(version: str, layout: str) -> None:
    config, tensors = trained(1, experts=8, r=8)
    config.target_parameters = ["experts.gate_up_proj"]
    alone = {n.replace(".base_layer", ""): t for n, t in tensors.items() if ".experts.base_layer.lora" in n}
    assert told(config, in_order(alone, 8, layout), peft_version=version).decided() == layout


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


def test_a_head_of_tinkers_name() -> None:
    shapes = {f"base_model.model.model.unembed_tokens.lora_{role}.weight": (2, 2) for role in "AB"}
    assert by_names(shapes).layout == "tinker" and by_names(["lm_head"]).layout is None
