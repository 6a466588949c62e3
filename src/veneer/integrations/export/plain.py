"""Plain LoRA in PEFT's format: one rank, one whole-numbered alpha, no option that came later."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...files.keys import PREFIX
from .base import Part, plain_config
from .folding import Rules
from .peft_files import PeftFiles


class Plain(PeftFiles):
    """Readers that know PEFT's format as it began: factors, r, lora_alpha, modules_to_save, bias."""

    name = "plain"
    reader = "any reader of PEFT's format, however old"
    rules = Rules("integer")
    keeps = frozenset({"embedding", "head", "conv", "modules_to_save", "bias"})

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
