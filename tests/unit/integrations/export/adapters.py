"""Adapters of every kind on small models, saved, with the updates that their layers have in memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.golden.models import Convolution, Mlp, Words, gpt2
from tests.laws.special_models import Attending, Mixture, Tied
from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.layers.layer import LoraLayer


def llama(tied: bool = False) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            tie_word_embeddings=tied,
        )
    ).eval()


def classifier() -> Any:
    from transformers import LlamaForSequenceClassification

    config = llama().config
    config.num_labels, config.pad_token_id = 3, 0
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config).eval()


@dataclass(frozen=True)
class Case:
    """A model, the options of its adapter, and for which targets it can be written."""

    build: Callable[[], nn.Module]
    options: dict[str, Any]
    targets: str
    #: The feature that every other target names in its refusal; several where there are several.
    feature: tuple[str, ...] = field(default=())


EVERY = "vllm sglang llama.cpp ollama mlx plain diffusers"
LM = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
NO_OLLAMA = "vllm sglang llama.cpp mlx plain diffusers"
NET = {"r": 4, "lora_alpha": 6, "target_modules": ["up", "down"]}
OTHER = "other than the layers' projections"

CASES: dict[str, Case] = {
    "linear": Case(llama, LM, EVERY),
    "rslora": Case(llama, {**LM, "r": 5, "use_rslora": True, "lora_alpha": 7}, EVERY),
    "patterns": Case(
        llama,
        {
            **LM,
            "rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 7},
            "alpha_pattern": {"layers.0.*q_proj": 5},
        },
        EVERY,
    ),
    "rslora and patterns": Case(llama, {**LM, "use_rslora": True, "rank_pattern": {"down_proj": 7}}, EVERY),
    "rank above a side": Case(llama, {**LM, "r": 16}, NO_OLLAMA, ("above a side",)),
    "subtracted start": Case(llama, {**LM, "r": 2, "init_lora_weights": "pissa"}, EVERY),
    "dora": Case(llama, {**LM, "use_dora": True}, "mlx diffusers", ("magnitudes of DoRA",)),
    "head": Case(
        llama, {**LM, "target_modules": ["q_proj", "lm_head"]}, "vllm llama.cpp mlx plain", ("output head",)
    ),
    "tied head": Case(
        lambda: llama(True), {**LM, "target_modules": ["lm_head"]}, "vllm plain", ("output head",)
    ),
    "llama embedding": Case(
        llama,
        {**LM, "target_modules": ["q_proj", "embed_tokens"]},
        "vllm llama.cpp mlx plain",
        ("embedding",),
    ),
    "embedding of a tied base": Case(
        lambda: llama(True),
        {**LM, "target_modules": ["embed_tokens"]},
        "vllm plain",
        ("embedding",),
    ),
    "one for both": Case(
        lambda: llama(True),
        {**LM, "target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        "vllm mlx",
        ("ensure_weight_tying",),
    ),
    "norms": Case(llama, {**LM, "modules_to_save": ["input_layernorm", "norm"]}, "plain", ("trained whole",)),
    "whole head": Case(llama, {**LM, "modules_to_save": ["lm_head"]}, "plain", ("trained whole",)),
    "head of a classifier": Case(
        classifier, {**LM, "task_type": "SEQ_CLS"}, "vllm plain", ("trained whole",)
    ),
    "whole module of a net": Case(Mlp, {**NET, "modules_to_save": ["head"]}, "plain", ("trained whole",)),
    "lora_bias": Case(Mlp, {**NET, "lora_bias": True}, "diffusers", ("lora_bias",)),
    "bias of the layers": Case(Mlp, {**NET, "bias": "lora_only"}, "plain", ("biases of the base",)),
    "every bias": Case(Mlp, {**NET, "bias": "all"}, "plain", ("biases of the base",)),
    "embedding": Case(
        Words, {**NET, "r": 3, "target_modules": ["table", "out"]}, "vllm llama.cpp plain", ("embedding",)
    ),
    "conv1d": Case(
        lambda: Convolution(1),
        {**NET, "target_modules": ["first", "second"]},
        "plain diffusers",
        ("convolution",),
    ),
    "conv2d": Case(
        lambda: Convolution(2), {**NET, "target_modules": ["first"]}, "plain diffusers", ("convolution",)
    ),
    "gpt2": Case(
        gpt2,
        {**NET, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        "vllm sglang llama.cpp mlx plain diffusers",
        (OTHER,),
    ),
    "attention": Case(Attending, {**NET, "target_modules": ["attn"]}, "", ("nn.MultiheadAttention",)),
    "experts": Case(
        Mixture,
        {**NET, "target_modules": ["head"], "target_parameters": ["experts.up", "experts.down"]},
        "",
        ("target_parameters",),
    ),
    "tokens": Case(
        lambda: Tied(False),
        {**NET, "target_modules": ["body"], "trainable_token_indices": {"embed": [3, 5]}},
        "",
        ("single trained tokens",),
    ),
    "repeated layers": Case(llama, {**LM, "layer_replication": [(0, 2), (0, 1)]}, "", ("layer_replication",)),
    "alora": Case(llama, {**LM, "alora_invocation_tokens": [1, 2]}, "", ("alora",)),
    "much at once": Case(
        Mlp,
        {**NET, "use_dora": True, "bias": "all", "modules_to_save": ["norm"]},
        "",
        ("magnitudes of DoRA", "trained whole"),
    ),
}


@dataclass(frozen=True)
class Saved:
    """An adapter on disk, its base, and what its layers do."""

    place: Path
    base: Path | None
    #: The base once more, made anew.
    model: nn.Module
    #: Module path -> update as (out, in[, k…]), (vocabulary, dim) of an embedding.
    updates: dict[str, Tensor]
    #: Of a DoRA, what merging changes in the weight.
    changes: dict[str, Tensor]


def save(name: str, place: Path, dtype: torch.dtype = torch.float32, **more: Any) -> Saved:
    """Make a case: factors of every size, nothing at its start."""
    case = CASES[name]
    torch.manual_seed(0)
    base = case.build()
    where = None
    if hasattr(base, "save_pretrained"):
        where = place / "base"
        base.save_pretrained(where)
    options = {**case.options, **more}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(
            base,
            LoraConfig(**options, base_model_name_or_path=where and str(where)),
            autocast_adapter_dtype=False,
        )
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = (torch.randn_like(parameter) * 0.3).to(dtype)
        adapted.peft_config["default"].base_model_name_or_path = where and str(where)
        adapted.save_pretrained(place / "adapter")
    updates = {path: _delta(layer) for path, layer in _layers(adapted).items()}
    changes = _changes(adapted) if options.get("use_dora") else {}
    torch.manual_seed(0)
    return Saved(place / "adapter", where, case.build(), updates, changes)


def _layers(model: PeftModel) -> dict[str, LoraLayer]:
    found = model.get_base_model().named_modules()
    return {
        path: layer for path, layer in found if isinstance(layer, LoraLayer) and ".base_layer" not in path
    }


@torch.no_grad()
def _delta(layer: LoraLayer) -> Tensor:
    return _as_linear(layer, layer.get_delta_weight("default").double())


@torch.no_grad()
def _changes(model: PeftModel) -> dict[str, Tensor]:
    """What a merge changes."""
    layers = _layers(model)
    kept = {path: layer.get_base_layer().weight.double().clone() for path, layer in layers.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    return {
        path: _as_linear(layer, layer.get_base_layer().weight.double() - kept[path])
        for path, layer in layers.items()
    }


def _as_linear(layer: LoraLayer, weight: Tensor) -> Tensor:
    return weight.T if type(layer.get_base_layer()).__name__ == "Conv1D" else weight
