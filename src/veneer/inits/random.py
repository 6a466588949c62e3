"""The random starts: the reference implementation's, its Gaussian form, and none at all."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from veneer.inits.base import Init, InitRequest, InitResult


def _kaiming(request: InitRequest, parameter: str, shape: tuple[int, ...]) -> Tensor:
    """Kaiming-uniform with a = √5.

    That is U(−1/√fan_in, 1/√fan_in) with fan_in = in·k….
    """
    bound = 1.0 / math.sqrt(max(1, math.prod(shape[1:])))
    return torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=request.generator(parameter))


def _normal(request: InitRequest, parameter: str, shape: tuple[int, ...], std: float = 1.0) -> Tensor:
    return torch.empty(shape, device="cpu").normal_(0.0, std, generator=request.generator(parameter))


def _zero_bias(request: InitRequest) -> Tensor | None:
    return torch.zeros(request.shape_b[0], device="cpu") if request.bias else None


class Default(Init):
    """A ~ Kaiming-uniform (a = √5), B = 0; for an embedding A = 0, B ~ N(0, 1).

    Source: Hu et al., "LoRA", 2021, section 4.1, in the form of its reference implementation
    (loralib), which differs from the paper's text by the distribution of A.
    """

    names = (True,)

    def __call__(self, request: InitRequest) -> InitResult:
        """A random, B zero."""
        if request.lookup:
            return InitResult(
                torch.zeros(request.shape_a, device="cpu"),
                _normal(request, "lora_embedding_B", request.shape_b),
            )
        a = _kaiming(request, "lora_A", request.shape_a)
        return InitResult(a, torch.zeros(request.shape_b, device="cpu"), _zero_bias(request))


class Gaussian(Init):
    """A ~ N(0, 1/r²), B = 0; an embedding starts as by default, as in the field.

    Source: Hu et al., "LoRA", 2021, section 4.1 ("a random Gaussian initialization for A and zero
    for B"), with the standard deviation 1/r that diffusion trainers use.
    """

    names = ("gaussian",)

    def __call__(self, request: InitRequest) -> InitResult:
        """A random, B zero."""
        if request.lookup:
            return InitResult(
                torch.zeros(request.shape_a, device="cpu"),
                _normal(request, "lora_embedding_B", request.shape_b),
            )
        a = _normal(request, "lora_A", request.shape_a, std=1.0 / request.spec.r)
        return InitResult(a, torch.zeros(request.shape_b, device="cpu"), _zero_bias(request))


class Arbitrary(Init):
    """Both factors random: not an identity. For debugging, so that an untrained adapter shows."""

    names = (False,)
    identity = False

    def __call__(self, request: InitRequest) -> InitResult:
        """A and B random."""
        if request.lookup:
            return InitResult(
                _normal(request, "lora_embedding_A", request.shape_a),
                _normal(request, "lora_embedding_B", request.shape_b),
            )
        a = _kaiming(request, "lora_A", request.shape_a)
        b = _kaiming(request, "lora_B", request.shape_b)
        bias = None
        if request.bias:
            bound = 1.0 / math.sqrt(max(1, math.prod(request.shape_b[1:])))
            bias = torch.empty(request.shape_b[0], device="cpu").uniform_(
                -bound, bound, generator=request.generator("lora_B.bias")
            )
        return InitResult(a, b, bias)
