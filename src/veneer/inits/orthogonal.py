"""Orthogonal starts: both factors are random, and their product is zero."""

from __future__ import annotations

import math

import torch

from veneer.inits.base import Init, InitRequest, InitResult, normal, zero_bias
from veneer.spec import LoraSpec


class Orthogonal(Init):
    """``A = Q₁ᵀ G / 10``, ``B = H Q₂ / 10``, with G and H normal: ``BA = H (Q₂ Q₁ᵀ) G / 100 = 0``.

    Q₁ and Q₂ (r/2, r) are the even and the odd rows of one random orthogonal matrix (r, r), so that both
    factors learn from the first step on. The product is zero up to rounding only. With groups each group's
    share of the rank is drawn for itself.

    Source: D. Datta, "Rethinking LoRA initialisation", section "Orthogonal initialisation"
    (https://datta0.github.io/posts/rethink-lora-init/).
    """

    names = ("orthogonal",)
    exact = False

    def refuses(self, spec: LoraSpec, layer_type: str, as_matrix: bool) -> str | None:
        """One half of the rank goes to each factor."""
        if spec.r % 2:
            return f"orthogonal factors need an even rank, got r={spec.r}"
        return None

    def __call__(self, request: InitRequest) -> InitResult:
        """Both factors random, with a product of zero."""
        r, (out, width) = request.spec.r, request.shape_b[:2]
        groups = r // width
        inside = math.prod(request.shape_a[1:])
        squares = normal(request, "orthogonal", (groups, width, width))
        q: torch.Tensor = torch.linalg.qr(squares).Q
        g = normal(request, "lora_A", (groups, width // 2, inside))
        h = normal(request, "lora_B", (groups, out // groups, width // 2))
        a = q[:, 0::2].transpose(1, 2) @ g / 10.0
        b = h @ q[:, 1::2] / 10.0
        return InitResult(a.reshape(request.shape_a), b.reshape(request.shape_b), zero_bias(request))
