"""CorDA: factorise the weight weighted by the covariance of its layer's inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.errors import ConfigError, Hint
from veneer.inits.base import Init, InitRequest, InitResult, not_one_matrix, subtracted
from veneer.spec import LoraSpec

#: The inverse of the covariance is accepted below this distance of ``C C⁻¹`` from the identity.
_INVERSE_ERROR = 0.05


@dataclass(frozen=True)
class ContextDirections:
    """Singular values and vectors of ``W C``, with those on the right multiplied by ``C⁻¹``.

    Attributes:
        u: (out, r).
        s: (r,).
        v: (in, r).
    """

    u: Tensor
    s: Tensor
    v: Tensor


@torch.no_grad()
def context_directions(weight: Tensor, covariance: Tensor, rank: int, method: str) -> ContextDirections:
    """``SVD(W C) = U S Vᵀ`` gives ``W = U S (Vᵀ C⁻¹)``; the first r terms for "ipm", the last for "kpm".

    C is damped by a hundredth of its mean diagonal, twice as much each time until it can be inverted.

    Args:
        weight: W (out, in).
        covariance: C (in, in), of the layer's inputs.
        rank: r.
        method: "ipm" (instruction-previewed: adapt to these inputs) or "kpm" (knowledge-preserved: keep what
            the layer does with them).

    Raises:
        ConfigError: If the covariance is zero or not finite: no damping makes it invertible.

    Source: Yang et al., "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models", 2024,
    equations 2 to 4.
    """
    weight, covariance = weight.float(), covariance.to(weight.device).float()
    mean = covariance.diagonal().mean()
    if not bool(covariance.isfinite().all()) or float(mean) <= 0.0:
        raise ConfigError("the covariance of the layer's inputs is zero or not finite")
    identity = torch.eye(covariance.shape[0], device=covariance.device)
    damp = 0.01
    while True:
        damped = covariance + damp * mean * identity
        inverse = torch.linalg.inv(damped)
        if float(torch.dist(damped @ inverse, identity)) < _INVERSE_ERROR:
            break
        damp *= 2
    u, s, vh = torch.linalg.svd(weight @ damped, full_matrices=False)
    rank = min(rank, s.numel())
    chosen = slice(rank) if method == "ipm" else slice(s.numel() - rank, None)
    return ContextDirections(u[:, chosen].clone(), s[chosen].clone(), (vh[chosen] @ inverse).T.contiguous())


class Corda(Init):
    """``B = U √(S/s)``, ``A = √(S/s) Vᵀ C⁻¹``, from ``SVD(W C)`` with C the covariance of the inputs.

    With the method "ipm" ``s·BA`` is the rank-r approximation of W of least error weighted by C,
    ``‖(W − s·BA) C‖``; with "kpm" it is the part of W that matters least for these inputs. ``stats`` are
    `ContextDirections`, from `preprocess_corda`. The published method leaves ``W − s·B₀A₀`` in the base.
    Here the base stays W, and ``s·B₀A₀`` is subtracted from the update.

    Source: Yang et al., "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models", 2024,
    equations 2 to 6.
    """

    names = ("corda",)
    subtracts_start = True
    measures_inputs = True
    measured_by = "preprocess_corda(model, config, run_model=...)"

    def refuses(self, spec: LoraSpec, layer_type: str, as_matrix: bool) -> str | None:
        return None if as_matrix else not_one_matrix("CorDA", layer_type)

    @torch.no_grad()
    def __call__(self, request: InitRequest) -> InitResult:
        """Compute the factors.

        Raises:
            ConfigError: If the statistics were measured for another rank or another layer.
        """
        found: ContextDirections = request.stats
        out, inside = request.shape_b[0], math.prod(request.shape_a[1:])
        rank = min(request.spec.r, out, inside)
        shapes, needed = (tuple(found.u.shape), tuple(found.v.shape)), ((out, rank), (inside, rank))
        if shapes != needed:
            raise ConfigError(
                f"{request.spec.path}: the statistics of preprocess_corda have shapes {shapes}, and {needed} "
                "are needed for ",
                Hint("r", request.spec.r),
                ": measure with the same model and configuration",
            )
        root = (found.s.float() / request.spec.scaling).sqrt()
        return subtracted(request, root[:, None] * found.v.float().T, found.u.float() * root)
