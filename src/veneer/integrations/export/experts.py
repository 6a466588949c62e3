"""Experts for readers that take one pair of factors for each of them."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ...errors import ExportError, Text
from ...expert_layouts.converting import convert
from ...expert_layouts.layouts import LAYOUTS, Layout
from ...expert_layouts.mixture import mixture_of
from ...expert_layouts.reading import find
from ...files.keys import PREFIX
from ...spec import resolve_all
from .base import Problem
from .peft_files import factors
from .source import Source, Update

#: What vLLM says of some models, and what it reads for them.
IN_STACKS = "experts one by one, over a base whose experts it loads as stacks"
AS_STACKS = Text(
    "`veneer convert` to the layout vllm-3d writes the stacks, whose ranks and strengths it reads"
)


def one_by_one(source: Source, layout: Layout) -> tuple[Source, list[Problem]]:
    """The adapter with an update for every expert, and what stands in the way.

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
            return source, [Problem(IN_STACKS, AS_STACKS)]
        made = convert(source.config, tensors, own, layout, base)
    except ExportError as error:
        return source, [Problem(str(error))]
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in made.tensors.items():
        path, _, role = name.removeprefix(PREFIX).rpartition(".lora_")
        pairs.setdefault(path, {})[role] = tensor
    specs = resolve_all(made.config, "default", dict.fromkeys(pairs, ""))
    updates = {
        path: source.updates.get(path) or Update(roles["A.weight"], roles["B.weight"], specs[path].scaling)
        for path, roles in pairs.items()
    }
    return replace(source, config=made.config, updates=updates), []
