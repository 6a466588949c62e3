"""Sums, truncation and norms of products of two thin factors; the dense product is never formed.

A sum ``Σ wᵢ Bᵢ Aᵢ`` is the product of two stacked factors ``L: (out, R)`` and ``M: (R, in)``. With
``L = Q₁ R₁`` and ``Mᵀ = Q₂ R₂`` its singular values, norm and truncation error are those of the small core
``R₁ R₂ᵀ``. Everything is computed in float32, in float64 where an input is float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.errors import CombineError

#: One summand ``weight · B A``: ``(B: (out, r), A: (r, in), weight)``.
Term = tuple[Tensor, Tensor, float]


@torch.no_grad()
def svd(terms: Sequence[Term]) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition of ``D = Σ wᵢ Bᵢ Aᵢ``.

    Args:
        terms: ``(B: (out, rᵢ), A: (rᵢ, in), wᵢ)``; ranks may differ and may exceed out and in.

    Returns:
        ``U: (out, k)``, ``S: (k,)`` descending, ``Vh: (k, in)``, ``k = min(Σ rᵢ, out, in)``,
        ``D = U diag(S) Vh``.

    Raises:
        CombineError: no terms, shapes that do not fit, or factors that are not finite.
    """
    left, right = _stacked(terms)
    q1, r1 = torch.linalg.qr(left)
    q2, r2 = torch.linalg.qr(right.t())
    u, s, vh = torch.linalg.svd(r1 @ r2.t(), full_matrices=False)
    return q1 @ u, s, vh @ q2.t()


@torch.no_grad()
def compress(terms: Sequence[Term], rank: int | None = None) -> tuple[Tensor, Tensor, float]:
    """The best approximation of ``D = Σ wᵢ Bᵢ Aᵢ`` by one pair of factors of a given rank.

    ``B = U √S``, ``A = √S Vh`` from the largest singular values: both factors have the same norm.

    Args:
        terms: ``(B: (out, rᵢ), A: (rᵢ, in), wᵢ)``.
        rank: of the result; padded with zeros if it exceeds the rank that D can have. None keeps D exactly,
            with rank ``min(Σ rᵢ, out, in)``.

    Returns:
        ``B: (out, rank)``, ``A: (rank, in)`` and the relative error ``||D - BA|| / ||D||`` in Frobenius norm:
        the root of the discarded share of the energy; 0.0 if nothing was discarded or D is 0.

    Raises:
        CombineError: as for `svd`, or a rank below 1.

    Source: Eckart and Young, Psychometrika 1 (1936).
    """
    if rank is not None and rank < 1:
        raise CombineError(f"the rank of a combination is at least 1, got {rank}")
    u, s, vh = svd(terms)
    return cut(u, s, vh, s.numel() if rank is None else rank)


@torch.no_grad()
def cut(u: Tensor, s: Tensor, vh: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The factors of given rank of a matrix ``U diag(S) Vh``, and the relative error; see `compress`.

    Args:
        u: ``(out, k)``, orthonormal.
        s: ``(k,)``, descending.
        vh: ``(k, in)``, orthonormal.
        rank: of the result; padded with zeros above k.
    """
    root = s[:rank].sqrt()
    B, A = u[:, :rank] * root, root.unsqueeze(1) * vh[:rank]
    missing = rank - root.numel()
    if missing > 0:
        B = torch.cat([B, B.new_zeros(B.shape[0], missing)], dim=1)
        A = torch.cat([A, A.new_zeros(missing, A.shape[1])], dim=0)
    energy = s.double().square()
    total = float(energy.sum())
    return B, A, 0.0 if total == 0.0 else float((energy[rank:].sum() / total).sqrt())


@torch.no_grad()
def spectrum(B: Tensor, A: Tensor) -> Tensor:
    """Singular values of ``B A``, descending: ``B: (out, r), A: (r, in) -> (min(r, out, in),)``."""
    values: Tensor = torch.linalg.svdvals(_core(B, A))
    return values


@torch.no_grad()
def norm(B: Tensor, A: Tensor) -> float:
    """Frobenius norm of ``B A``. By Gram matrices half of the digits would be lost."""
    return float(torch.linalg.matrix_norm(_core(B, A)))


def _core(B: Tensor, A: Tensor) -> Tensor:
    left, right = _stacked([(B, A, 1.0)])
    r1 = torch.linalg.qr(left, mode="r").R
    r2 = torch.linalg.qr(right.t(), mode="r").R
    core: Tensor = r1 @ r2.t()
    return core


def _stacked(terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
    """``L: (out, Σ rᵢ)`` with the weights inside, and ``M: (Σ rᵢ, in)``."""
    _check(terms)
    double = any(t.dtype == torch.float64 for B, A, _ in terms for t in (B, A))
    dtype = torch.float64 if double else torch.float32
    left = torch.cat([B.detach().to(dtype) * weight for B, _, weight in terms], dim=1)
    right = torch.cat([A.detach().to(dtype) for _, A, _ in terms], dim=0)
    # A finite sum proves that all terms are finite; an infinite one may only have overflowed.
    suspect = not math.isfinite(float(left.sum() + right.sum()))
    if suspect and not bool(left.isfinite().all() and right.isfinite().all()):
        raise CombineError("the factors or weights to combine hold NaN or infinite values")
    return left, right


def _check(terms: Sequence[Term]) -> None:
    if not terms:
        raise CombineError("there is nothing to combine: no terms were given")
    problems = []
    out, inside = terms[0][0].shape[0], terms[0][1].shape[-1]
    for index, (B, A, _) in enumerate(terms):
        if not (B.dim() == A.dim() == 2 and B.shape[1] == A.shape[0]):
            problems.append(f"term {index}: B {tuple(B.shape)} and A {tuple(A.shape)} have no product")
        elif (B.shape[0], A.shape[1]) != (out, inside):
            problems.append(
                f"term {index}: shape {(B.shape[0], A.shape[1])}, the first one is {(out, inside)}"
            )
    if problems:
        raise CombineError("these updates cannot be added: " + "; ".join(problems))
