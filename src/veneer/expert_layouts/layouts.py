"""One table of the layouts: each row says how a program names the factors of experts, and in what order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from veneer.errors import ConfigError
from veneer.wording import did_you_mean

#: One tensor an expert; the experts folded into the axis of the rank; the experts as an axis of their own.
Form = Literal["each", "folded", "stacked"]

#: The stacks of transformers 5 and the projections of an expert that each holds, by their names as modules.
STACKS = {
    "gate_up_proj": (("gate_proj", "w1"), ("up_proj", "w3")),
    "down_proj": (("down_proj", "w2"),),
}


@dataclass(frozen=True)
class Layout:
    """How the factors of experts lie in a file.

    In the form ``each``, expert e has ``experts.e.gate_proj.lora_A.weight`` (r, in) and ``lora_B`` (out, r).
    Folded, a stack has A (E·r, in), one expert after the other, and B (out, r·E), in which the expert
    changes fastest; that of ``gate_up_proj`` is called ``experts.base_layer``, that of ``down_proj``
    ``experts``. Stacked, ``experts.w1.lora_A.weight`` is (E, r, in) and ``lora_B`` (E, out, r).

    Attributes:
        name: What ``--layout`` takes.
        program: Who writes or reads it.
        form: How the tensors are cut.
        source: Where the layout is from.
        numbered: Whether projections are called w1, w2 and w3; None for the names of the base model.
        turned: Folded: A holds Bᵀ and B holds Aᵀ.
        by_storage: Whether that is so only over a base that stores (experts, out, in).
        expert_slowest: Folded: B holds one expert after the other.
        one_a: Whether gate and up have the same A.
        whole: Whether every expert must have gate, up and down.
        shared: Which factors may lie there once for all experts.
        renames: What other modules are called, and their names in transformers.
    """

    name: str
    program: str
    form: Form
    source: str
    numbered: bool | None = None
    turned: bool = False
    by_storage: bool = False
    expert_slowest: bool = False
    one_a: bool = False
    whole: bool = False
    shared: Literal["none", "any", "outer"] = "none"
    renames: tuple[tuple[str, str], ...] = ()

    def over(self, transposed: bool) -> Layout:
        """This layout over a base that stores (experts, in, out), or over another."""
        return replace(self, turned=False) if transposed and self.by_storage else self


_ROWS = (
    Layout(
        "transformers-4",
        "PEFT with transformers 4, where every expert was a module",
        "each",
        "transformers 4.57, MixtralSparseMoeBlock and Qwen3MoeSparseMoeBlock",
    ),
    Layout(
        "peft",
        "PEFT 0.19.1 to 0.21, target_parameters",
        "folded",
        "peft 0.19.1 and 0.21.0, tuners/lora/layer.py, ParamWrapper.get_delta_weight",
    ),
    Layout(
        "peft-0.18",
        "PEFT 0.17 to 0.19.0, target_parameters",
        "folded",
        "peft 0.18.0, tuners/lora/layer.py, ParamWrapper.get_delta_weight",
        turned=True,
        by_storage=True,
    ),
    Layout(
        "unsloth",
        "Unsloth before September 2026",
        "folded",
        "unsloth_zoo 2026.10.9, temporary_patches/moe_utils.py, LORA_B_LAYOUT_GROUPED_BY_EXPERT",
        expert_slowest=True,
    ),
    Layout(
        "vllm",
        "vLLM, for models whose experts it loads one by one",
        "each",
        "vllm 0.32.0, lora/lora_weights.py, PackedLoRALayerWeights.pack_moe",
        whole=True,
    ),
    Layout(
        "vllm-3d",
        "vLLM, for models whose experts it loads as stacks, such as gpt-oss",
        "folded",
        "vllm 0.32.0, lora/model_manager.py, _stack_moe_lora_weights",
        whole=True,
    ),
    Layout(
        "vllm-shared",
        "vLLM with enable_moe_shared_loras",
        "stacked",
        "vllm 0.32.0, lora/lora_weights.py, PackedLoRALayerWeights.pack_moe_stacked",
        numbered=True,
        whole=True,
        shared="any",
    ),
    Layout(
        "sglang",
        "SGLang, one tensor an expert",
        "each",
        "sglang 0.5.23, srt/lora/mem_pool.py, load_lora_weight_to_buffer",
    ),
    Layout(
        "sglang-shared",
        "SGLang with one outer factor for all experts",
        "stacked",
        "sglang 0.5.23, srt/lora/lora_manager.py, _detect_shared_outer_loras",
        numbered=False,
        shared="outer",
    ),
    Layout(
        "megatron-bridge",
        "Megatron-Bridge, for base models with one tensor an expert",
        "each",
        "megatron-bridge 0.6.2, models/conversion/peft_bridge.py, stream_adapter_weights_megatron_to_hf",
        one_a=True,
    ),
    Layout(
        "megatron-bridge-stacks",
        "Megatron-Bridge, for base models with stacks of experts",
        "folded",
        "megatron-bridge 0.6.2, models/conversion/peft_bridge.py, _pack_target_parameter_adapter_weights",
        turned=True,
        expert_slowest=True,
    ),
    Layout(
        "automodel",
        "NeMo Automodel with v4_compatible",
        "each",
        "nemo_automodel 0.7.0, components/moe/state_dict_mixin.py, _convert_lora_expert_to_hf",
        numbered=False,
        one_a=True,
    ),
    Layout(
        "tinker",
        "Tinker's archives",
        "stacked",
        "tinker_cookbook 0.6.1, weights/_adapter.py, _expand_expert_weights",
        numbered=True,
        shared="any",
        renames=((".model.unembed_tokens.", ".lm_head."),),
    ),
)

#: Every layout by its name.
LAYOUTS: Mapping[str, Layout] = {row.name: row for row in _ROWS}


def known(name: str) -> Layout:
    """The layout of a name.

    Raises:
        ConfigError: There is none; names those that there are.
    """
    if name not in LAYOUTS:
        near = did_you_mean(name, LAYOUTS)
        raise ConfigError(f"there is no layout {name!r}{near}; there are {', '.join(LAYOUTS)}")
    return LAYOUTS[name]
