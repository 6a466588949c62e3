"""MiCA: B is frozen on the directions in which the weight does least, and A is trained."""

from __future__ import annotations

import torch

from veneer.inits.base import Init, InitRequest, InitResult
from veneer.spec import LoraSpec


class Mica(Init):
    """``W = U S Vᵀ``: B is the last r columns of U, those of the smallest singular values, and A is zero.

    B is never trained, so the update stays in the span of those columns.

    Source: "Minor Component Adaptation", 2026 (https://arxiv.org/abs/2604.01694).
    """

    names = ("mica",)
    reads_weight = True
    freezes_b = True
    linear_only = True

    def refuses(self, spec: LoraSpec, layer_type: str, as_matrix: bool) -> str | None:
        return None if spec.variant == "plain" else f"MiCA is not defined for the variant {spec.variant!r}"

    @torch.no_grad()
    def __call__(self, request: InitRequest) -> InitResult:
        """A of zeros, and the minor left singular vectors."""
        weight = request.matrix().float()
        u = torch.linalg.svd(weight, full_matrices=False).U
        a = torch.zeros(request.shape_a, device=weight.device)
        return InitResult(a, u[:, -request.spec.r :].contiguous())
