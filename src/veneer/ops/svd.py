"""Singular value decompositions: truncated, by random projection, and of rows that come in batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: Batches whose smaller side exceeds this many times the number of components are reduced by random
#: projection.
_EXACT_UP_TO = 8
#: Up to so many rows or columns a truncated decomposition comes from all eigenvectors of the Gram matrix.
_DENSE_UP_TO = 256
#: A block of the Krylov space has so many columns more than are wanted, and this share of all at most.
_BESIDE, _BLOCK_SHARE = 8, 1 / 8
#: The Krylov space grows until a further block would catch no more than this share of what is missed.
_CAUGHT = 1e-3
#: Singular values that are looked at first where an energy decides how many are needed.
_FIRST_GUESS = 32
#: Columns of a matrix that are converted to float64 at a time.
_COLUMNS = 1 << 12


@torch.no_grad()
def truncated_svd(
    matrix: Tensor, rank: int | None = None, energy: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values of a matrix and their vectors: so many, or as many as an energy takes.

    A few of many come from a block Krylov space, which grows until what it misses hardly shrinks: the error
    ``‖M - U diag(S) Vh‖`` is then less than a thousandth above the smallest one, and the number that an
    energy takes may be one too many. Otherwise they come from the eigenvectors of the Gram matrix, in
    float64. What is kept is never less than the energy. Beyond the matrix, memory is that of the Gram matrix
    of its smaller side, or of the Krylov space.

    Args:
        matrix: M (out, in), of a floating type of 32 bits or more.
        rank: How many, at most ``min(out, in)``.
        energy: Take the least number that keeps this share of ``Σσ²``, but at least one.

    Returns:
        ``U: (out, k)``, ``S: (k,)`` descending, ``Vh: (k, in)``.

    Source: Musco and Musco, "Randomized Block Krylov Methods for Stronger and Faster Approximate Singular
    Value Decomposition", NeurIPS 28 (2015), algorithm 2.
    """
    turned = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if turned else matrix
    whole, side = float(torch.linalg.matrix_norm(wide)) ** 2, len(wide)
    count = _FIRST_GUESS if rank is None else min(rank, side)
    while side > _DENSE_UP_TO and count + _BESIDE <= _BLOCK_SHARE * side:
        left, squares = _krylov(wide, count, whole)
        missing = 0.0 if energy is None else energy * whole - float(squares.sum())
        if missing <= 0:
            break
        # None of the values to come is larger than the last one.
        count += max(count, math.ceil(min(missing / float(squares[-1]), side)))
    else:
        left, squares = _gram(wide)
        whole = float(squares.sum())
    if energy is not None:
        count = min(int((squares.cumsum(0) < energy * whole).sum()) + 1, len(squares))
    left = left[:, :count]
    right = wide.T @ left
    s = torch.linalg.vector_norm(right, dim=0)
    right /= s.clamp_min(torch.finfo(s.dtype).tiny)
    return (right, s, left.T) if turned else (left, s, right.T)


def _gram(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """All left singular vectors of a matrix and their squared values, descending; the latter in float64."""
    gram = matrix.new_zeros(len(matrix), len(matrix), dtype=torch.float64)
    for at in range(0, matrix.shape[1], _COLUMNS):
        part = matrix[:, at : at + _COLUMNS].double()
        gram.addmm_(part, part.T)
    squares, vectors = torch.linalg.eigh(gram)
    return vectors.flip(1).to(matrix), squares.flip(0).clamp_min(0)


def _krylov(matrix: Tensor, count: int, whole: float) -> tuple[Tensor, Tensor]:
    """The ``count`` largest as `_gram` has them, from ``[M Ω, (M Mᵀ) M Ω, …]``; ``whole`` is ``‖M‖²``."""
    width, generator = count + _BESIDE, torch.Generator().manual_seed(0)
    block = matrix @ torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    basis, rows = block[:, :0], block.new_zeros(matrix.shape[1], 0, dtype=torch.float64)
    gram, caught = rows[:0], -math.inf
    while basis.shape[1] + width <= len(matrix):
        for _ in range(2):  # what a small remainder of the first time holds is mostly rounding
            block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
        product = matrix.T @ block
        basis, rows = torch.cat([basis, block], 1), torch.cat([rows, product.double()], 1)
        edge = rows.T @ rows[:, -width:]
        gram = torch.cat([torch.cat([gram, edge[:-width]], 1), edge.T])
        squares, vectors = (found.flip(-1)[..., :count] for found in torch.linalg.eigh(gram))
        before, caught = caught, float(squares.sum())
        if caught - before <= max(_CAUGHT * (whole - caught), torch.finfo(matrix.dtype).eps * whole):
            break
        block = matrix @ product
    return basis @ vectors.to(basis), squares.clamp_min(0)


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
