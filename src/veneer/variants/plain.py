"""Plain LoRA: the update is added."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from veneer.variants.base import Branch, Variant


class Plain(Variant):
    """``W' = W + s·BA``.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, equation 3.
    """

    name = "plain"
    additive = True

    def forward(
        self, layer: Branch, name: str, x: Tensor, result: Tensor, base: Callable[[], Tensor]
    ) -> Tensor:
        return layer.add_branch(name, x, result)

    def merged(self, weight: Tensor, delta: Tensor, extra: Mapping[str, Tensor]) -> Tensor:
        return weight + delta
