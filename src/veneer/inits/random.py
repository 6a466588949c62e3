"""The random initialisations: PEFT's default, its Gaussian form, and one that is not an identity."""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from veneer.inits.base import Init, InitRequest, InitResult, kaiming, normal, zero_bias


class Default(Init):
    """A ~ Kaiming-uniform (a = √5), B = 0; for an embedding A = 0, B ~ N(0, 1).

    Source: Hu et al., "LoRA", 2021, section 4.1, in the form of its reference implementation
    (loralib), which differs from the paper's text by the distribution of A.
    """

    names: ClassVar[tuple[bool | str, ...]] = (True,)

    def __call__(self, request: InitRequest) -> InitResult:
        """A random, B zero."""
        if request.lookup:
            return InitResult(
                torch.zeros(request.shape_a, device="cpu"),
                normal(request, "lora_embedding_B", request.shape_b),
                fresh=True,
            )
        a = kaiming(request, "lora_A", request.shape_a)
        return InitResult(a, torch.zeros(request.shape_b, device="cpu"), zero_bias(request), fresh=True)


class Gaussian(Default):
    """A ~ N(0, 1/r²), B = 0; for an embedding the default, as in PEFT.

    Source: Hu et al., "LoRA", 2021, section 4.1 ("a random Gaussian initialization for A and zero
    for B"), with the standard deviation 1/r that diffusion trainers use.
    """

    names = ("gaussian",)

    def __call__(self, request: InitRequest) -> InitResult:
        """A random, B zero."""
        if request.lookup:
            return super().__call__(request)
        a = normal(request, "lora_A", request.shape_a, std=1.0 / request.spec.r)
        return InitResult(a, torch.zeros(request.shape_b, device="cpu"), zero_bias(request), fresh=True)


class Arbitrary(Init):
    """Both factors random, so not an identity: for debugging, where an untrained adapter should show."""

    names = (False,)
    identity = False

    def __call__(self, request: InitRequest) -> InitResult:
        """A and B random."""
        if request.lookup:
            return InitResult(
                normal(request, "lora_embedding_A", request.shape_a),
                normal(request, "lora_embedding_B", request.shape_b),
                fresh=True,
            )
        a = kaiming(request, "lora_A", request.shape_a)
        b = kaiming(request, "lora_B", request.shape_b)
        bias = None
        if request.bias:
            bound = 1.0 / math.sqrt(max(1, math.prod(request.shape_b[1:])))
            bias = torch.empty(request.shape_b[0], device="cpu").uniform_(
                -bound, bound, generator=request.generator("lora_B.bias")
            )
        return InitResult(a, b, bias, fresh=True)
