"""LoftQ: a rounded base weight, and factors that make up for the rounding."""

from __future__ import annotations

import torch

from veneer.errors import ConfigError
from veneer.inits.base import Init, InitRequest, InitResult
from veneer.ops.normal_float import round_to_bits
from veneer.spec import LoraSpec


class LoftQ(Init):
    """Alternates ``Q ← q(W − s·BA)`` and ``s·BA ← the best rank-r approximation of W − Q``.

    By nature it replaces the base weight by Q (rounded to ``loftq_bits``, kept in the weight's own
    dtype), so that the adapted layer, not the base, stays near W. The factors take the scaling into
    account: what is approximated is ``W − Q ≈ s·BA`` for every ``lora_alpha``. The scale of a block
    moves with its largest value, so a round can be worse than the one before: the best one is kept.

    Source: Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization", 2023, algorithm 1.
    """

    names = ("loftq",)
    identity = False
    replaces_base = True

    def refuses(self, spec: LoraSpec, layer_type: str, as_matrix: bool) -> str | None:
        """It needs one matrix to factorise."""
        if not as_matrix:
            return f"LoftQ factorises one matrix, and the update of this {layer_type} is not one"
        return None

    @torch.no_grad()
    def __call__(self, request: InitRequest) -> InitResult:
        """The rounded weight and its correction.

        Raises:
            ConfigError: Without a `LoftQConfig`.
        """
        options = request.spec.loftq
        if options is None:
            raise ConfigError("init_lora_weights='loftq' needs loftq_config=LoftQConfig(...)")
        weight = request.matrix().float()
        r, scaling = request.spec.r, request.spec.scaling
        rank = min(r, *weight.shape)
        a = best_a = weight.new_zeros(r, weight.shape[1])
        b = best_b = weight.new_zeros(weight.shape[0], r)
        best, least = weight, float("inf")
        for _ in range(options.loftq_iter):
            rounded = round_to_bits(weight - scaling * (b @ a), options.loftq_bits)
            u, s, vh = torch.linalg.svd(weight - rounded, full_matrices=False)
            a, b = torch.zeros_like(a), torch.zeros_like(b)
            root = (s[:rank] / scaling).sqrt()
            a[:rank] = root[:, None] * vh[:rank]
            b[:, :rank] = u[:, :rank] * root
            error = float(s[rank:].square().sum())  # ‖W − Q − s·BA‖²: what the cut left out
            if error < least:
                best, best_a, best_b, least = rounded, a, b, error
        bias = torch.zeros(request.shape_b[0], device="cpu") if request.bias else None
        return InitResult(best_a.reshape(request.shape_a), best_b.reshape(request.shape_b), bias, base=best)
