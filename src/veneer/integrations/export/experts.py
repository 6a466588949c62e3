"""Experts for readers that take a pair of factors for each of them, or those of all in stacks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ...config import LoraConfig
from ...errors import ExportError
from ...expert_layouts.converting import Converted, convert, read_all
from ...expert_layouts.layouts import LAYOUTS, STACKS, Layout
from ...expert_layouts.mixture import mixture_of
from ...expert_layouts.reading import find, folded, path_of, unfolded
from ...files.keys import PREFIX
from ...spec import resolve_all
from .base import Problem
from .peft_files import factors
from .source import Source, Update

#: What vLLM reads for the models whose experts it loads as stacks, and what it calls the two.
IN_STACKS = LAYOUTS["vllm-3d"]
_NAMES = {"gate_up_proj": ".base_layer", "down_proj": ""}
_EXPERT = re.compile(rf"(?P<holder>.+\.experts)\.\d+\.(?P<stack>{'|'.join(STACKS)})")


def one_by_one(source: Source, layout: Layout) -> tuple[Source, list[Problem]]:
    """The adapter with an update for every expert, and what stands in the way.

    Over a base whose experts vLLM loads as stacks, an expert has two updates, that of ``gate_up_proj`` and
    that of ``down_proj``; `in_stacks` brings them together.

    Args:
        source: The adapter, with stacks of experts or with experts one by one.
        layout: Of the form ``each``.
    """
    tensors = factors(source.updates)
    found = find({name: tuple(t.shape) for name, t in tensors.items()}, source.config)
    if not found.places:
        return source, []
    own = LAYOUTS["peft" if "folded" in found.forms else "transformers-4"]
    try:
        base = mixture_of(source.base_config(), source.config.base_model_name_or_path)
        if layout.name == "vllm" and base.stacked_in_vllm:
            made = convert(source.config, tensors, own, IN_STACKS, base)
            experts, others = read_all(made.config, made.tensors, IN_STACKS, base)
        else:
            made = convert(source.config, tensors, own, layout, base)
            experts, others = {}, list(made.tensors)
    except ExportError as error:
        return source, [Problem(str(error))]
    updates = _updates(source, made, others)
    for holder, parts in experts.items():
        for stack, all_of_it in parts.items():
            for expert, (a, b) in enumerate(zip(all_of_it.a, all_of_it.b, strict=True)):
                updates[path_of(holder, stack, expert)] = Update(a, b, all_of_it.scaling)
    return replace(source, config=_without_stacks(made.config), updates=updates), []


def _updates(source: Source, made: Converted, names: list[str]) -> dict[str, Update]:
    pairs: dict[str, dict[str, Tensor]] = {}
    for name in names:
        path, _, role = name.removeprefix(PREFIX).rpartition(".lora_")
        pairs.setdefault(path, {})[role] = made.tensors[name]
    specs = resolve_all(made.config, "default", dict.fromkeys(pairs, ""))
    return {
        path: source.updates.get(path) or Update(roles["A.weight"], roles["B.weight"], specs[path].scaling)
        for path, roles in pairs.items()
    }


def _without_stacks(config: LoraConfig) -> LoraConfig:
    named = [name for name in config.target_parameters or () if name.rpartition(".")[2] not in STACKS]
    return replace(config, target_parameters=named or None)


def stacks_of(updates: Mapping[str, Update]) -> dict[str, list[Update]]:
    """Path of a stack, such as ``0.mlp.experts.gate_up_proj`` -> the updates of its experts, in order."""
    found: dict[str, list[Update]] = {}
    for path, update in updates.items():
        if match := _EXPERT.fullmatch(path):
            found.setdefault(f"{match['holder']}.{match['stack']}", []).append(update)
    # Without the joined stack, `down_proj` is a module of each expert.
    holders = [path.rpartition(".")[0] for path in found if path.endswith(".gate_up_proj")]
    return {path: every for path, every in found.items() if path.rpartition(".")[0] in holders}


def in_stacks(updates: Mapping[str, Update]) -> dict[str, Update]:
    """Updates with the two of every expert folded into those of ``experts.base_layer`` and ``experts``."""
    stacks = stacks_of(updates)
    made = {
        path: update
        for path, update in updates.items()
        if not ((match := _EXPERT.fullmatch(path)) and f"{match['holder']}.{match['stack']}" in stacks)
    }
    for path, every in stacks.items():
        holder, _, stack = path.rpartition(".")
        a, b = (torch.stack([getattr(update, name) for update in every]) for name in "ab")
        made[holder + _NAMES[stack]] = Update(*folded(a, b, IN_STACKS), every[0].scaling)
    return made


def out_of_stacks(updates: Mapping[str, Update], r: int) -> dict[str, Update]:
    """The inverse of `in_stacks`; r is the rank of an expert."""
    made = dict(updates)
    for holder in [path for path in updates if path.endswith(".experts") and f"{path}.base_layer" in updates]:
        for stack, ending in _NAMES.items():
            update = made.pop(holder + ending)
            for expert, (a, b) in enumerate(zip(*unfolded(update.a, update.b, r, IN_STACKS), strict=True)):
                made[path_of(holder, stack, expert)] = Update(a, b, update.scaling)
    return made
