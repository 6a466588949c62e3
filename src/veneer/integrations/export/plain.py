"""Plain LoRA in PEFT's format: one rank, one whole-numbered alpha, no option that came later."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ...errors import Hint, Text
from ...expert_layouts.layouts import LAYOUTS
from ...files.keys import PREFIX
from ...wording import listed
from .base import Part, Problem, plain_config
from .experts import one_by_one
from .folding import Rules
from .peft_files import PeftFiles
from .source import Source
from .ways import WAYS


class Plain(PeftFiles):
    """Readers that know PEFT's format as it began: factors, r, lora_alpha, modules_to_save, bias."""

    name = "plain"
    reader = "any reader of PEFT's format, however old"
    rules = Rules("integer")
    keeps = frozenset({"embedding", "head", "conv", "modules_to_save", "bias"})
    ways = MappingProxyType({feature: way for feature, way in WAYS.items() if feature != "lora_bias"})
    takes_copies = True

    def prepared(self, source: Source) -> tuple[Source, dict[str, Tensor], list[Problem]]:
        """With an update for every expert, and biases of B added, as ``s·b``, to the layers' own."""
        source, problems = one_by_one(source, LAYOUTS["transformers-4"])
        if problems:
            return source, {}, problems
        if not source.features().get("lora_bias"):
            return source, {}, []
        base = source.base
        saved = {
            name.removeprefix(PREFIX).removesuffix(".base_layer.bias"): tensor
            for name, tensor in source.others.get("bias", {}).items()
        }
        found: dict[str, Tensor] = {}
        lacking = []
        for path, update in source.updates.items():
            if update.bias is not None:
                own = saved.get(path, None if base is None else base.tensor(path, "bias"))
                if own is None:
                    lacking.append(path)
                else:
                    found[path] = (own.double() + update.scaling * update.bias.double()).to(update.bias.dtype)
        if base is None and lacking:
            way = Text(Hint("base"), ", the model's directory, to add it to the layers' own biases")
            return source, {}, [Problem("a bias of B (lora_bias) without the base model", way)]
        if lacking:
            return (
                source,
                {},
                [Problem(f"a bias of B (lora_bias) on layers without a bias: {listed(lacking)}")],
            )
        others = {kind: dict(tensors) for kind, tensors in source.others.items()}
        for path in found:
            others.get("bias", {}).pop(f"{PREFIX}{path}.base_layer.bias", None)
        updates = {path: replace(update, bias=None) for path, update in source.updates.items()}
        config = replace(source.config, lora_bias=False)
        return replace(source, config=config, updates=updates, others=others), found, []

    def config(self, part: Part) -> dict[str, Any]:
        """With ``bias="lora_only"`` where biases of B were added to those of the layers."""
        bias = part.source.config.bias
        return plain_config(part, bias="lora_only" if part.biases and bias == "none" else bias)

    def others(self, part: Part) -> dict[str, Tensor]:
        """Everything, the embeddings' copies too."""
        copies = {f"{PREFIX}{path}.base_layer.weight": t for path, t in part.source.copies.items()}
        biases = {f"{PREFIX}{path}.base_layer.bias": t for path, t in part.biases.items()}
        return {**super().others(part), **copies, **biases}

    def usage(self, place: object, parts: list[Part]) -> str:
        return f"PeftModel.from_pretrained(base_model, {str(place)!r})"
