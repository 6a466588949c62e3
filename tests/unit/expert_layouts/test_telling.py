"""The order of B in a stack, told from trained factors; the full study is benchmarks/expert_layouts.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.expert_layouts import in_order, told, trained
from veneer import LoraConfig
from veneer.errors import AdapterFileError
from veneer.expert_layouts import telling
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


@pytest.fixture(scope="module")
def untrained() -> tuple[LoraConfig, dict[str, Tensor]]:
    """B is drawn at random: the two orders look alike."""
    config, tensors = trained(1, experts=8, r=8)
    torch.manual_seed(0)
    return config, {n: torch.randn_like(t) if "lora_B" in n else t for n, t in tensors.items()}


def test_without_training_and_without_marks_it_is_ambiguous(
    untrained: tuple[LoraConfig, dict[str, Tensor]],
) -> None:
    found = told(*untrained)
    assert found.layout == "peft" and found.others == ("unsloth",)
    with pytest.raises(AdapterFileError, match=r"ambiguous, peft or unsloth: .*from_layout decides"):
        found.decided()
    assert found.remark() is None


DETAIL = {"parameters": {name: {"lora_B_layout": "rank_major"} for name in ("gate_up_proj", "down_proj")}}
MIXED = {"parameters": {"a": {"lora_B_layout": "rank_major"}, "b": {"lora_B_layout": "grouped_by_expert"}}}
MARKS: dict[str, tuple[dict[str, object], str | None]] = {
    "PEFT's version": ({"peft_version": "0.20.0"}, "peft"),
    "Unsloth's order": ({"lora_B_layout": "grouped_by_expert", "peft_version": "0.20.0"}, "unsloth"),
    "Unsloth's order of each stack": ({"auto_mapping": {"unsloth_fused_expert_lora": DETAIL}}, "peft"),
    "Unsloth before it wrote the order": (
        {"auto_mapping": {"unsloth_fixed": True}, "peft_version": "0.20.0"},
        "unsloth",
    ),
    "orders that differ": ({"unsloth_fused_expert_lora": MIXED}, None),
    "PEFT's other mapping": ({"auto_mapping": {"parent_library": "x"}}, None),
}


@pytest.mark.parametrize("mark", MARKS)
def test_who_wrote_the_file_decides_where_its_columns_do_not(
    mark: str, untrained: tuple[LoraConfig, dict[str, Tensor]]
) -> None:
    values, layout = MARKS[mark]
    found = told(*untrained, **values)
    assert (found.layout if not found.others else None) == layout and found.unlike is None


def test_columns_overrule_a_mark_only_where_they_are_certain(monkeypatch: pytest.MonkeyPatch) -> None:
    config, tensors = trained(1, experts=8, r=8)
    other = in_order(tensors, 8, "unsloth")
    assert "are in the layout unsloth" in (told(config, other).remark() or "")
    assert told(config, other, peft_version="0.21.2").decided() == "unsloth"
    assert told(config, tensors, auto_mapping={"unsloth_fixed": True}).decided() == "peft"
    monkeypatch.setattr(telling, "CERTAIN", 1000.0)
    found = told(config, other, peft_version="0.21.2")
    assert (found.decided(), found.unlike) == ("peft", "unsloth")
    assert "but look like unsloth" in (found.remark() or "")
    found = told(config, tensors, auto_mapping={"unsloth_fixed": True})
    assert (found.decided(), found.unlike) == ("unsloth", "peft")


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
