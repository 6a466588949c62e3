"""EVA: A spans the directions in which the layer's inputs vary most."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.inits.base import Init, InitRequest, InitResult, filled, kaiming, zero_bias


class Eva(Init):
    """A: the first right singular vectors of the layer's inputs; B = 0.

    ``stats`` are those vectors (k, in·k…). Without them A starts as by default, until
    `initialize_lora_eva_weights` has measured them.

    Source: Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance Adaptation", 2024,
    section 3.2 and algorithm 1.
    """

    names = ("eva",)
    measures_inputs = True
    measured_by = "initialize_lora_eva_weights(model, dataloader)"
    measured_in_place = True

    @torch.no_grad()
    def __call__(self, request: InitRequest) -> InitResult:

        if request.stats is None:
            a = kaiming(request, "lora_A", request.shape_a)
            b = torch.zeros(request.shape_b, device="cpu")
            return InitResult(a, b, zero_bias(request), unmeasured=True)
        rows: Tensor = request.stats[: request.spec.r].float()
        start = filled(request, rows, rows.new_zeros(request.shape_b[0], rows.shape[0]))
        return InitResult(*start, zero_bias(request))
