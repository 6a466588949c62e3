"""Orthogonal initialisation: both factors are random, and their product is zero."""

from __future__ import annotations

import math

import torch

from veneer.errors import Hint, Text
from veneer.inits.base import Init, InitRequest, InitResult, normal, not_one_matrix, zero_bias
from veneer.spec import LoraSpec


class Orthogonal(Init):
    """``A = Q₁ᵀ G / 10``, ``B = H Q₂ / 10``, with G and H normal: ``BA = H (Q₂ Q₁ᵀ) G / 100 = 0``.

    Q₁ and Q₂ (r/2, r) are the even and the odd rows of one random orthogonal matrix (r, r), so that both
    factors learn from the first step on. The product is zero up to rounding only.

    Source: D. Datta, "Rethinking LoRA initialisation", section "Orthogonal initialisation"
    (https://datta0.github.io/posts/rethink-lora-init/).
    """

    names = ("orthogonal",)
    exact = False

    def refuses(self, spec: LoraSpec, layer_type: str, as_matrix: bool) -> str | Text | None:

        if spec.r % 2:
            return Text("orthogonal factors need an even rank, got ", Hint("r", spec.r))
        return None if as_matrix else not_one_matrix("an orthogonal start", layer_type)

    def __call__(self, request: InitRequest) -> InitResult:
        """Both factors random, with a product of zero."""
        r, inside = request.spec.r, math.prod(request.shape_a[1:])
        q: torch.Tensor = torch.linalg.qr(normal(request, "orthogonal", (r, r))).Q
        a = q[0::2].T @ normal(request, "lora_A", (r // 2, inside)) / 10.0
        b = normal(request, "lora_B", (request.shape_b[0], r // 2)) @ q[1::2] / 10.0
        return InitResult(a.reshape(request.shape_a), b.reshape(request.shape_b), zero_bias(request))
