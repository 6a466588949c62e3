"""OLoRA: start from an orthonormal basis of the weight's columns."""

from __future__ import annotations

import torch

from veneer.inits.base import Init, InitRequest, InitResult, not_one_matrix, subtracted
from veneer.spec import LoraSpec


class OLora(Init):
    """``W = Q R``: B is the first r columns of Q, A the first r rows of R.

    The published method leaves ``W − s·B₀A₀`` in the base. Here the base stays W, and ``s·B₀A₀`` is
    subtracted from the update.

    Source: Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", 2024,
    algorithm 1.
    """

    names = ("olora",)
    subtracts_start = True

    def refuses(self, spec: LoraSpec, layer_type: str, as_matrix: bool) -> str | None:
        return None if as_matrix else not_one_matrix("OLoRA", layer_type)

    @torch.no_grad()
    def __call__(self, request: InitRequest) -> InitResult:
        """The first columns of Q and rows of R, and the same frozen."""
        q, r = torch.linalg.qr(request.matrix().float())
        rank = min(request.spec.r, r.shape[0])
        return subtracted(request, r[:rank], q[:, :rank])
