"""ΔW of every expert from the tensors of a file, by each program's own formula and by nothing of Veneer's."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from veneer.config import LoraConfig
from veneer.expert_layouts.experts import Factors
from veneer.expert_layouts.mixture import Mixture

EXPERTS, R, HIDDEN, INNER = 4, 2, 8, 6
MIXTURES = {
    "qwen3_moe": Mixture(known=True),
    "mixtral": Mixture(known=True, numbered=True),
    "gpt_oss": Mixture(known=True, transposed=True, interleaved=True, stacked_in_vllm=True),
}
HOLDERS = [f"base_model.model.model.layers.{layer}.mlp.experts" for layer in range(2)]

#: (holder's number, projection, expert) -> ΔW.
Deltas = dict[tuple[int, str, int], Tensor]


def factors(kind: str) -> dict[str, dict[str, Factors]]:
    """Random factors: all different, ``one_a`` for gate and up, or an outer one shared by all experts."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    found = {}
    for holder in HOLDERS:
        outer = 1 if kind == "shared" else EXPERTS
        gate = draw(outer, R, HIDDEN)
        up = gate if kind != "plain" else draw(outer, R, HIDDEN)
        found[holder] = {
            "gate_proj": Factors(gate, draw(EXPERTS, INNER, R), 4.0),
            "up_proj": Factors(up, draw(EXPERTS, INNER, R), 4.0),
            "down_proj": Factors(draw(EXPERTS, R, INNER), draw(outer, HIDDEN, R), 4.0),
        }
    return found


def deltas(experts: Mapping[str, Mapping[str, Factors]]) -> Deltas:
    """ΔW of factors that are apart."""
    return {
        (number, part, expert): made.delta(expert)
        for number, parts in enumerate(experts.values())
        for part, made in parts.items()
        for expert in range(EXPERTS)
    }


def scaling(config: LoraConfig, path: str) -> float:
    """PEFT's rule: the first pattern that matches the end of a path."""

    def first(patterns: Mapping[str, Any], default: Any) -> Any:
        return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)

    r, alpha = first(config.rank_pattern, config.r), first(config.alpha_pattern, config.lora_alpha)
    return alpha / (r**0.5 if config.use_rslora else r)


def read(name: str, mixture: Mixture, config: LoraConfig, tensors: Mapping[str, Tensor]) -> Deltas:
    """ΔW of every expert as the program of a layout computes it."""
    found: Deltas = {}
    for number in range(len(HOLDERS)):
        holder = next(
            match[0]
            for key in tensors
            if (match := re.match(rf"base_model\.model\.model\.layers\.{number}\.\w+\.experts", key))
        )
        inside = f"{holder}."
        own = {k.removeprefix(inside): t.double() for k, t in tensors.items() if k.startswith(inside)}
        path = inside.removeprefix("base_model.model.")
        apart = _READERS[name](own, mixture, lambda part, path=path: scaling(config, path + part))
        found |= {(number, *place): delta for place, delta in apart.items()}
    return found


_Own = Mapping[str, Tensor]
_Scale = Callable[[str], float]
_Found = dict[tuple[str, int], Tensor]
_OLD = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def _each(own: _Own, mixture: Mixture, scale: _Scale) -> _Found:
    found = {}
    for key in own:
        if match := re.fullmatch(r"(\d+)\.(\w+)\.lora_A\.weight", key):
            expert, part = match[1], match[2]
            delta = own[f"{expert}.{part}.lora_B.weight"] @ own[key]
            found[_OLD.get(part, part), int(expert)] = scale(f"{expert}.{part}") * delta
    return found


def _stacked(own: _Own, mixture: Mixture, scale: _Scale) -> _Found:
    found = {}
    for key in own:
        part = key.removesuffix(".lora_A.weight")
        if part != key:
            delta = scale(part) * (own[f"{part}.lora_B.weight"] @ own[key])
            found |= {(_OLD.get(part, part), expert): delta[expert] for expert in range(EXPERTS)}
    return found


def _folded(
    product: Callable[[Tensor, Tensor, Mixture], Tensor],
) -> Callable[[_Own, Mixture, _Scale], _Found]:
    """Of the product of a stack's factors as (experts, out, in)."""

    def read(own: _Own, mixture: Mixture, scale: _Scale) -> _Found:
        down = scale("down_proj") * product(own["lora_A.weight"], own["lora_B.weight"], mixture)
        both = product(own["base_layer.lora_A.weight"], own["base_layer.lora_B.weight"], mixture)
        both = scale("gate_up_proj") * both
        gate, up = (both[:, 0::2], both[:, 1::2]) if mixture.interleaved else both.chunk(2, dim=1)
        parts = {"gate_proj": gate, "up_proj": up, "down_proj": down}
        return {(part, e): delta[e] for part, delta in parts.items() for e in range(EXPERTS)}

    return read


def _peft(a: Tensor, b: Tensor, mixture: Mixture) -> Tensor:
    a, b = a.reshape(EXPERTS, -1, a.shape[-1]), b.reshape(b.shape[0], -1, EXPERTS)
    return torch.einsum("ore,eri->eoi", b, a)


def _peft_0_18(a: Tensor, b: Tensor, mixture: Mixture) -> Tensor:
    """In the shape of the parameter, (experts, in, out) for gpt-oss and (experts, out, in) for others."""
    a, b = a.reshape(EXPERTS, -1, a.shape[-1]), b.reshape(b.shape[0], -1, EXPERTS)
    stored = torch.einsum("ore,eri->eio", b, a)
    return stored.mT if mixture.transposed else stored


def _unsloth(a: Tensor, b: Tensor, mixture: Mixture) -> Tensor:
    r = a.shape[0] // EXPERTS
    return torch.stack([b[:, e * r : (e + 1) * r] @ a[e * r : (e + 1) * r] for e in range(EXPERTS)])


def _megatron(a: Tensor, b: Tensor, mixture: Mixture) -> Tensor:
    """Its own packing undone: Bᵀ of each expert one below the other, Aᵀ side by side."""
    outs, ins = a.chunk(EXPERTS, dim=0), b.chunk(EXPERTS, dim=1)
    return torch.stack([out.T @ into.T for out, into in zip(outs, ins, strict=True)])


_READERS: dict[str, Callable[[_Own, Mixture, _Scale], _Found]] = {
    **dict.fromkeys(("transformers-4", "vllm", "sglang", "megatron-bridge", "automodel"), _each),
    **dict.fromkeys(("vllm-shared", "sglang-shared", "tinker"), _stacked),
    **dict.fromkeys(("peft", "vllm-3d"), _folded(_peft)),
    "peft-0.18": _folded(_peft_0_18),
    "unsloth": _folded(_unsloth),
    "megatron-bridge-stacks": _folded(_megatron),
}


def plain_config(**more: Any) -> LoraConfig:
    return LoraConfig(r=R, lora_alpha=4 * R, target_modules=["q_proj"], **more)
