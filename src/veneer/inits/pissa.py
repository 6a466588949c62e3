"""PiSSA: train the principal part of the weight."""

from __future__ import annotations

import re

import torch

from veneer.inits.base import Init, InitRequest, InitResult, not_one_matrix, subtracted
from veneer.ops.svd import randomised_svd
from veneer.spec import LoraSpec

_ROUNDS = re.compile(r"pissa_niter_(\d+)")


class Pissa(Init):
    """``s·BA`` is the best rank-r approximation of W: ``W = U S Vᵀ``, ``B = U √(S/s)``, ``A = √(S/s) Vᵀ``.

    The published method leaves ``W − s·B₀A₀`` in the base. Here the base stays W, and ``s·B₀A₀`` is
    subtracted from the update. ``"pissa_niter_N"`` computes the r singular values by N rounds of a random
    projection.

    Source: Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large
    Language Models", 2024, equations 2 to 4; section 4.4 for the fast decomposition.
    """

    names = ("pissa",)
    subtracts_start = True

    def claims(self, value: bool | str) -> bool:
        return super().claims(value) or (isinstance(value, str) and _ROUNDS.fullmatch(value) is not None)

    def refuses(self, spec: LoraSpec, layer_type: str, as_matrix: bool) -> str | None:
        return None if as_matrix else not_one_matrix("PiSSA", layer_type)

    @torch.no_grad()
    def __call__(self, request: InitRequest) -> InitResult:
        """The principal part, and the same frozen."""
        weight = request.matrix().float()
        rank = min(request.spec.r, *weight.shape)
        rounds = _ROUNDS.fullmatch(str(request.spec.init))
        if rounds:
            u, s, vh = randomised_svd(weight, rank, int(rounds[1]), request.generator("pissa"))
        else:
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        root = (s[:rank] / request.spec.scaling).sqrt()
        return subtracted(request, root[:, None] * vh[:rank], u[:, :rank] * root)
