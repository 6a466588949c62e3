"""aLoRA: the adapter acts from its invocation tokens on; before them the model is its base."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from veneer.spec import LoraSpec
from veneer.variants.base import Branch, Variant


class ALora(Variant):
    """``y_t = W x_t + s·BA x_t`` for positions t from the last invocation on, ``W x_t`` before.

    Before its invocation the keys and values of a text are those of the base model, and can be shared. The
    positions belong to the call, not to the layer, which looks them up while it runs.

    Source: Greenewald et al., "Activated LoRA: Fine-tuned LLMs for Intrinsics", 2025, section 3.
    """

    name = "alora"
    reads_weight = False

    def refuses(self, spec: LoraSpec, layer_type: str) -> str | None:
        # Only layers that map (batch, tokens, in) row by row have positions.
        if "Linear" in layer_type or layer_type == "Conv1D":
            return None
        return f"aLoRA acts on positions of a text, and the input of a {layer_type} is not laid out by them"

    def refuses_merge(self, spec: LoraSpec) -> str | None:
        return (
            f"{spec.adapter!r} is an aLoRA, which acts on the positions from its invocation on and not "
            "before it: no weight does that. Keep it unmerged"
        )

    def forward(
        self, layer: Branch, name: str, x: Tensor, result: Tensor, base: Callable[[], Tensor]
    ) -> Tensor:
        """``result + s·BA x`` where the adapter acts, ``result`` elsewhere."""
        where = layer.acting(name, x).unsqueeze(-1)
        if torch.is_grad_enabled():  # the factors' gradients are sums over all positions
            x = torch.where(where.to(x.device), x, x.new_zeros(()))
        return torch.where(where.to(result.device), layer.add_branch(name, x, result), result)

    def merged(self, weight: Tensor, delta: Tensor, extra: Mapping[str, Tensor]) -> Tensor:
        """The weight on the positions where it acts; `refuses_merge` prevents a merge."""
        return weight + delta
