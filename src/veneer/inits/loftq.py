"""LoftQ: a quantised base weight, and factors that compensate for the rounding."""

from __future__ import annotations

import torch

from veneer.inits.base import Init, InitRequest, InitResult, filled, not_one_matrix, zero_bias
from veneer.ops.normal_float import round_to_bits
from veneer.spec import LoraSpec


class LoftQ(Init):
    """Alternates ``Q ← q(W − s·BA)`` and ``s·BA ← the best rank-r approximation of W − Q``.

    The base weight is replaced by Q (rounded to ``loftq_bits``, stored in the weight's dtype), so the adapted
    layer, not the base, stays near W. The factors allow for the scaling: ``W − Q ≈ s·BA`` for every
    ``lora_alpha``. The scale of a block changes with its largest value, so a round can be worse than the one
    before: the best one is kept.

    Source: Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization", 2023, algorithm 1.
    """

    names = ("loftq",)
    identity = False
    replaces_base = True

    def refuses(self, spec: LoraSpec, layer_type: str, as_matrix: bool) -> str | None:
        return None if as_matrix else not_one_matrix("LoftQ", layer_type)

    @torch.no_grad()
    def __call__(self, request: InitRequest) -> InitResult:

        options = request.spec.init_config
        weight = request.matrix().float()
        scaling = request.spec.scaling
        rank = min(request.spec.r, *weight.shape)
        a = best_a = weight.new_zeros(rank, weight.shape[1])
        b = best_b = weight.new_zeros(weight.shape[0], rank)
        best, least = weight, float("inf")
        for _ in range(options.loftq_iter):
            rounded = round_to_bits(weight - scaling * (b @ a), options.loftq_bits)
            u, s, vh = torch.linalg.svd(weight - rounded, full_matrices=False)
            root = (s[:rank] / scaling).sqrt()
            a, b = root[:, None] * vh[:rank], u[:, :rank] * root
            error = float(s[rank:].square().sum())  # ‖W − Q − s·BA‖²
            if error < least:
                best, best_a, best_b, least = rounded, a, b, error
        return InitResult(*filled(request, best_a, best_b), zero_bias(request), base=best)
