"""LoRA-GA: start along the gradient of full fine-tuning."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.config import LoraGAConfig
from veneer.inits.base import Init, InitRequest, InitResult, not_one_matrix, subtracted
from veneer.ops.svd import randomised_svd
from veneer.spec import LoraSpec

_ROUNDS = 4


class LoraGA(Init):
    """``G = U S Vᵀ``, the loss's gradient by W: A from r of its first 2r right vectors, B from left ones.

    Which of them: ``direction`` "ArB2r" gives A the first r and B the next r, "A2rBr" the other way round,
    "ArBr" alternates, "random" draws r for both. B's columns are multiplied by their singular values; then
    ``scale`` "stable" multiplies B by ``out^¼ / √γ``, "weight_svd" gives it the length of W's first singular
    value, "gd_scale" divides both factors by s, "unit" leaves them.

    ``stats`` are G (out, in·k…), from `preprocess_loraga`. The published method leaves ``W − s·B₀A₀`` in the
    base. Here the base stays W, and ``s·B₀A₀`` is subtracted from the update.

    Source: Wang et al., "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", 2024, theorem 3.1 and
    algorithm 1; the singular values in B are as in PEFT.
    """

    names = ("lora_ga",)
    subtracts_start = True
    measured_by = "preprocess_loraga(model, config, train_step)"

    def refuses(self, spec: LoraSpec, layer_type: str, as_matrix: bool) -> str | None:
        return None if as_matrix else not_one_matrix("LoRA-GA", layer_type)

    @torch.no_grad()
    def __call__(self, request: InitRequest) -> InitResult:
        """Directions of the gradient, and the same frozen."""
        options = request.spec.init_config or LoraGAConfig()
        gradient: Tensor = request.stats.float()
        r = request.spec.r
        top = min(2 * r, *gradient.shape)
        u, s, vh = randomised_svd(gradient, top, _ROUNDS, request.generator("lora_ga"))
        for_a, for_b = _directions(options.direction, r, top, request)
        a, b = vh[for_a], u[:, for_b] * s[for_b]
        if options.scale == "stable":
            b = b * (gradient.shape[0] ** 0.25 / options.stable_gamma**0.5)
        elif options.scale == "weight_svd" and float(s[for_b][0]) > 0:
            first = torch.linalg.matrix_norm(request.matrix().float(), ord=2)
            b = b * (first / s[for_b][0])
        elif options.scale == "gd_scale":
            a, b = a / request.spec.scaling, b / request.spec.scaling
        return subtracted(request, a, b)


def _directions(direction: str, r: int, top: int, request: InitRequest) -> tuple[Tensor, Tensor]:
    """Indices of the singular vectors for A and for B: r each, or as many as the gradient has."""
    every = torch.arange(top)
    if direction == "random":
        drawn = torch.randperm(top, generator=request.generator("lora_ga.direction"))[:r]
        return drawn, drawn
    if direction == "ArBr":
        for_a, for_b = every[1::2], every[0::2]
    else:
        first, second = every[:r], every[r:]
        for_a, for_b = (first, second) if direction == "ArB2r" else (second, first)
    size = min(len(for_a), len(for_b))
    return for_a[:size], for_b[:size]
