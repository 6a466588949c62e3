"""Singular value decompositions: truncated, by random projection, and of rows that come in batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Batches whose smaller side exceeds this many times the number of components are reduced by random
#: projection.
_EXACT_UP_TO = 8
#: Above this many rows and columns a truncated decomposition comes from random projections,
_DENSE_UP_TO = 512
#: with so many power iterations.
_ROUNDS = 6
#: Singular values that are looked at first where an energy decides how many are needed.
_FIRST_GUESS = 32


@torch.no_grad()
def truncated_svd(
    matrix: Tensor, rank: int | None = None, energy: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values of a matrix and their vectors: so many, or as many as an energy takes.

    Where both sides exceed 512 they come from `randomised_svd`. Then the number that an energy takes may be a
    little above the smallest one; what it keeps is never less than the energy.

    Args:
        matrix: M (out, in), of a floating type of 32 bits or more.
        rank: How many, at most ``min(out, in)``.
        energy: Take the least number that keeps this share of ``Σσ²``, but at least one.

    Returns:
        ``U: (out, k)``, ``S: (k,)`` descending, ``Vh: (k, in)``.
    """
    whole, side = float(torch.linalg.matrix_norm(matrix)) ** 2, min(matrix.shape)
    guess = _FIRST_GUESS if rank is None else min(rank, side)
    generator = torch.Generator().manual_seed(0)
    while side > _DENSE_UP_TO and 4 * guess <= side:
        u, s, vh = randomised_svd(matrix, guess, _ROUNDS, generator)
        kept = s.double().square().cumsum(0)
        if energy is None or float(kept[-1]) >= energy * whole:
            break
        guess *= 2
    else:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        kept = s.double().square().cumsum(0)
        whole = float(kept[-1])  # the norm before was rounded otherwise
    count = guess if energy is None else min(int((kept < energy * whole).sum()) + 1, len(s))
    return u[:, :count], s[:count], vh[:count]


@torch.no_grad()
def randomised_svd(
    matrix: Tensor, rank: int, rounds: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``rank`` largest singular values and their vectors, from a random projection.

    The range of ``(M Mᵀ)^q M Ω`` is orthonormalised after every product, with Ω (in, l) normal and
    ``l = 2·rank``, but at least ``rank + 8``. If l reaches a side of the matrix, the result is exact.

    Args:
        matrix: M (out, in).
        rank: Number of singular values, at most ``min(out, in)``.
        rounds: q, the number of power iterations.
        generator: Draws Ω, on the CPU.

    Returns:
        ``U: (out, rank)``, ``S: (rank,)`` descending, ``Vh: (rank, in)``.

    Source: Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 53 (2011),
    algorithms 4.4 and 5.1.
    """
    width = min(max(2 * rank, rank + 8), *matrix.shape)
    omega = torch.randn(matrix.shape[1], width, generator=generator, device="cpu").to(matrix)
    q: Tensor = torch.linalg.qr(matrix @ omega).Q
    for _ in range(rounds):
        q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ q).Q).Q
    u, s, vh = torch.linalg.svd(q.T @ matrix, full_matrices=False)
    return (q @ u)[:, :rank], s[:rank], vh[:rank]


@dataclass(frozen=True)
class Components:
    """The principal components of the rows seen so far.

    Attributes:
        count: Number of rows seen.
        mean: (d,), in float64.
        variance: (d,) sums of squared deviations, in float64.
        values: (k,) singular values of the centred rows, descending.
        vectors: (k, d) right singular vectors; the entry of largest magnitude of each is positive.
    """

    count: int
    mean: Tensor
    variance: Tensor
    values: Tensor
    vectors: Tensor

    @property
    def explained(self) -> Tensor:
        """(k,) Share of the total variance that each component explains."""
        return self.values.double().square() / self.variance.sum().clamp_min(torch.finfo(torch.float64).tiny)


@torch.no_grad()
def update_components(before: Components | None, rows: Tensor, k: int) -> Components:
    """Update ``k`` principal components with a new batch of rows.

    The centred matrix of all rows has, up to earlier truncation, the singular values and right vectors of
    ``[diag(values) vectors; rows − mean(rows); √(n m / (n + m)) (mean before − mean(rows))]``. Memory is that
    of the batch and of k vectors, whatever the number of rows.

    Args:
        before: The components of the previous rows; None for the first batch.
        rows: (m, d), at least k of them in the first batch.
        k: Number of components.

    Source: Ross et al., "Incremental Learning for Robust Visual Tracking", IJCV 77 (2008), section 2.1.
    """
    rows = rows.float()
    m, mean = rows.shape[0], rows.double().mean(0)
    centred = rows - mean.to(rows)
    variance = centred.double().square().sum(0)
    stack = centred
    count, total_mean = m, mean
    if before is not None:
        n = before.count
        count = n + m
        shift = before.mean - mean
        stack = torch.cat(
            [
                before.values[:, None] * before.vectors,
                centred,
                (shift * (n * m / count) ** 0.5).to(rows)[None],
            ]
        )
        variance = before.variance + variance + shift.square() * (n * m / count)
        total_mean = (before.mean * n + mean * m) / count
    if min(stack.shape) > _EXACT_UP_TO * k:
        _, s, vh = randomised_svd(stack, k, 4, torch.Generator().manual_seed(0))
    else:
        _, s, vh = torch.linalg.svd(stack, full_matrices=False)
        s, vh = s[:k], vh[:k]
    at = vh.abs().argmax(dim=1, keepdim=True)
    vh = vh * torch.where(vh.gather(1, at) < 0, -1.0, 1.0)
    return Components(count, total_mean, variance, s, vh)
