"""The algebra of thin factors against dense singular value decompositions in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.tolerances import BY_DTYPE, OPS_SPECTRUM, Tolerance, assert_close
from veneer.errors import CombineError
from veneer.ops.low_rank import compress, norm, spectrum, svd

#: out, in, rank: tall, wide, square, and ranks above one and above both sides.
GEOMETRIES = [(40, 24, 4), (24, 40, 4), (16, 16, 3), (5, 30, 8), (30, 5, 8), (6, 7, 50), (1, 9, 2)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def pair(out: int, inside: int, r: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(out, r, dtype=dtype), torch.randn(r, inside, dtype=dtype)


def dense(*terms: tuple[Tensor, Tensor, float]) -> Tensor:
    return torch.stack([weight * B.double() @ A.double() for B, A, weight in terms]).sum(0)


def tolerance(dtype: torch.dtype) -> Tolerance:
    return BY_DTYPE[dtype] if dtype == torch.float64 else OPS_SPECTRUM


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "inside", "r"), GEOMETRIES)
def test_one_pair(out: int, inside: int, r: int, dtype: torch.dtype) -> None:
    B, A = pair(out, inside, r, dtype)
    D = dense((B, A, 1.0))
    size = float(D.norm())
    values = spectrum(B, A)
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(values / size, torch.linalg.svdvals(D)[: min(r, out, inside)] / size, tolerance(dtype))
    assert_close(torch.tensor(norm(B, A) / size), torch.tensor(1.0), OPS_SPECTRUM)
    U, S, Vh = svd([(B, A, 1.0)])
    assert_close(U * S @ Vh / size, D / size, tolerance(dtype))
    eye = torch.eye(S.numel(), dtype=U.dtype)
    assert_close(U.t() @ U, eye, tolerance(dtype))
    assert_close(Vh @ Vh.t(), eye, tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "inside", "r"), GEOMETRIES)
def test_an_exact_sum(out: int, inside: int, r: int, dtype: torch.dtype) -> None:
    terms = [(*pair(out, inside, r, dtype), 0.7), (*pair(out, inside, r + 2, dtype), -1.3)]
    B, A, error = compress(terms)
    rank = min(2 * r + 2, out, inside)
    assert (B.shape, A.shape) == ((out, rank), (rank, inside))
    size = dense(*terms).norm()
    assert_close(B.double() @ A.double() / size, dense(*terms) / size, tolerance(dtype))
    assert error == 0.0
    for scale_B, scale_A in zip(B.norm(dim=0), A.norm(dim=1), strict=True):
        assert_close(scale_B / size.sqrt(), scale_A / size.sqrt(), OPS_SPECTRUM)


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize(("out", "inside", "r"), GEOMETRIES)
def test_truncation_is_the_best_there_is_and_reports_its_error(
    out: int, inside: int, r: int, rank: int
) -> None:
    terms = [(*pair(out, inside, r), 1.0), (*pair(out, inside, r), 0.5)]
    D = dense(*terms)
    B, A, error = compress(terms, rank)
    assert (B.shape, A.shape) == ((out, rank), (rank, inside))
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    best = U[:, :rank] * S[:rank] @ Vh[:rank]
    assert_close(B @ A / D.norm(), best / D.norm(), BY_DTYPE[torch.float64])
    actual = (D - B @ A).norm() / D.norm()
    assert_close(torch.tensor(error, dtype=torch.float64), actual, BY_DTYPE[torch.float64])


def test_a_rank_above_what_there_is_is_filled_with_zeros() -> None:
    B, A = pair(5, 9, 2)
    wide_B, wide_A, error = compress([(B, A, 1.0)], 16)
    assert (wide_B.shape, wide_A.shape, error) == ((5, 16), (16, 9), 0.0)
    assert not wide_B[:, 2:].any() and not wide_A[2:].any()
    assert_close(wide_B @ wide_A, B @ A)


def test_weight_one_is_the_identity_and_opposite_weights_cancel() -> None:
    B, A = pair(30, 20, 4)
    again, other, error = compress([(B, A, 1.0)], 4)
    assert error == 0.0
    assert_close(again @ other, B @ A)
    gone_B, gone_A, _ = compress([(B, A, 1.0), (B, A, -1.0)], 4)
    assert (gone_B @ gone_A).norm() < OPS_SPECTRUM.atol * norm(B, A)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_updates(dtype: torch.dtype) -> None:
    B, A = torch.zeros(30, 4, dtype=dtype), torch.randn(4, 20).to(dtype)
    left, right, error = compress([(B, A, 1.0), (A.t()[:30].new_zeros(30, 2), A[:2], 3.0)], 4)
    assert error == 0.0 and not (left @ right).any() and left.isfinite().all() and right.isfinite().all()
    assert norm(B, A) == 0.0 and not spectrum(B, A).any()


def test_nearly_cancelling_terms_keep_their_digits() -> None:
    """Gram matrices in float32 lose a difference of 1e-4 of the terms altogether."""
    B, A = (factor.float() for factor in pair(40, 30, 4))
    small = torch.randn(40, 1) * 1e-4, torch.randn(1, 30)
    left, right = torch.cat([B, -B, small[0]], 1), torch.cat([A, A, small[1]], 0)
    exact = dense((*small, 1.0)).norm()
    assert abs(norm(left, right) - exact) < 0.01 * exact


def test_what_cannot_be_combined_is_refused() -> None:
    good = (*pair(5, 6, 2), 1.0)
    with pytest.raises(CombineError, match="no terms"):
        compress([])
    with pytest.raises(
        CombineError, match=r"term 1: shape \(5, 7\).*\(5, 6\); term 2: B \(5, 2\) and A \(3, 6\)"
    ):
        compress([good, (*pair(5, 7, 2), 1.0), (torch.ones(5, 2), torch.ones(3, 6), 1.0)])
    with pytest.raises(CombineError, match="at least 1"):
        compress([good], 0)
    with pytest.raises(CombineError, match="NaN or infinite"):
        compress([good, (*pair(5, 6, 2), math.nan)])
    with pytest.raises(CombineError, match="NaN or infinite"):
        spectrum(torch.full((5, 2), torch.inf), torch.ones(2, 6))


def test_inputs_are_not_changed_and_no_graph_is_kept() -> None:
    B, A = (factor.requires_grad_() for factor in pair(9, 8, 3))
    kept = B.detach().clone(), A.detach().clone()
    left, right, _ = compress([(B, A, 2.0)], 2)
    assert not left.requires_grad and not right.requires_grad
    assert torch.equal(B, kept[0]) and torch.equal(A, kept[1])
