"""Merging: one rounding, what is kept, and refusals that leave the weight alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tests.tolerances import OPS_KEPT, assert_close
from veneer.errors import MergeError
from veneer.ops import merging
from veneer.ops.merging import is_finite, merge_dense, merge_into_

SCALING = 2.5
ALL = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def pair(
    out: int = 20, inside: int = 24, r: int = 4, *, std: float = 0.1, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    return (torch.randn(out, r) * std).to(dtype), torch.randn(r, inside).to(dtype)


def coarse(*size: int) -> Tensor:
    """Multiples of 1/8: products and sums of a few are exact in float32."""
    return torch.randint(-16, 17, size).float() / 8


@pytest.fixture(params=[50, 1 << 18], ids=["chunks of two rows", "one chunk"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "CHUNK_ELEMENTS", request.param)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", ALL)
def test_adds_the_update(dtype: torch.dtype, transpose: bool, factor_dtype: torch.dtype) -> None:
    weight = torch.randn(20, 24).to(dtype)
    first, second = pair(dtype=factor_dtype), pair(r=7, dtype=factor_dtype)
    dense = SCALING * first[0].double() @ first[1].double() - 0.5 * second[0].double() @ second[1].double()
    expected = weight.double() + dense
    stored = nn.Parameter(weight.t().contiguous() if transpose else weight.clone())
    version = stored._version
    merge_into_(stored, [(*first, SCALING), (*second, -0.5)], transpose=transpose)
    assert_close(stored.detach().t() if transpose else stored.detach(), expected)
    assert stored._version > version, "autograd must see that the weight changed"
    assert stored.requires_grad and stored.grad_fn is None


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_rounded_once(dtype: torch.dtype) -> None:
    weight, (B, A), (B2, A2) = (torch.randn(20, 24).to(dtype), (coarse(20, 3), coarse(3, 24)), pair(r=1))
    B2, A2 = coarse(20, 1), coarse(1, 24)
    exact = weight.double() + 0.25 * B.double() @ A.double() + 0.5 * B2.double() @ A2.double()
    merge_into_(weight, [(B, A, 0.25), (B2, A2, 0.5)])
    assert torch.equal(weight, exact.to(dtype))


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("std", [1.0, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kept_is_the_share_that_arrived(dtype: torch.dtype, std: float) -> None:
    weight = torch.randn(64, 48).to(dtype)
    B, A = pair(64, 48, std=std)
    before, update = weight.double(), SCALING * B.double() @ A.double()
    kept = merge_into_(weight, [(B, A, SCALING)])
    lost = (weight.double() - before - update).norm() / update.norm()
    assert_close(torch.tensor(kept), 1 - lost.float(), OPS_KEPT)
    again, share = merge_dense(before.to(dtype), update.float())
    assert_close(torch.tensor(share), torch.tensor(kept), OPS_KEPT)
    assert_close(again, weight)


def test_a_small_update_of_a_bfloat16_weight_is_mostly_lost_and_a_float32_one_is_not() -> None:
    B, A = pair(64, 48, std=1e-4)
    weight = torch.randn(64, 48)
    assert merge_into_(weight.bfloat16(), [(B, A, 1.0)]) < 0.2
    assert merge_into_(weight.clone(), [(B, A, 1.0)]) == 1.0
    assert merge_into_(weight.double(), [(B, A, 1.0)]) == 1.0


@pytest.mark.parametrize("dtype", ALL)
def test_nothing_to_add(dtype: torch.dtype) -> None:
    weight = torch.randn(20, 24).to(dtype)
    before = weight.clone()
    B, A = pair()
    assert merge_into_(weight, []) == 1.0
    assert merge_into_(weight, [(torch.zeros_like(B), A, SCALING)]) == 1.0
    assert merge_into_(weight, [(B, A, 0.0)], check_finite=True) == 1.0
    assert torch.equal(weight, before)
    assert (
        merge_into_(torch.empty(0, 24, dtype=dtype), [(torch.empty(0, 4), A, 1.0)], check_finite=True) == 1.0
    )


def test_strided_weights_are_written_where_they_are() -> None:
    for dtype in ALL:
        whole = torch.randn(48, 40).to(dtype)
        before = whole.clone()
        B, A = pair()
        merge_into_(whole.t()[::2, ::2], [(B, A, SCALING)])
        assert_close(whole.t()[::2, ::2], before.t()[::2, ::2].double() + SCALING * B.double() @ A.double())
        assert torch.equal(whole[1::2], before[1::2]) and torch.equal(whole[:, 1::2], before[:, 1::2])


def test_factors_that_require_grad_stay_out_of_the_graph() -> None:
    B, A = (factor.requires_grad_() for factor in pair())
    weight = torch.randn(20, 24)
    merge_into_(weight, [(B, A, 1.0)])
    assert not weight.requires_grad
    assert not merge_dense(weight, B @ A)[0].requires_grad


@pytest.mark.usefixtures("chunked")
def test_an_overflow_of_float16_is_refused_and_changes_nothing() -> None:
    weight = torch.full((20, 24), 6e4, dtype=torch.float16)
    before = weight.clone()
    with pytest.raises(
        MergeError, match=r"480 of 480 elements.*leaves the range of torch.float16.*not changed"
    ):
        merge_into_(weight, [(torch.ones(20, 1) * 1e4, torch.ones(1, 24), 1.0)])
    assert torch.equal(weight, before)
    near = torch.full((20, 24), 6e4, dtype=torch.float16)  # the cheap bound fails, the exact look does not
    B = torch.ones(20, 2) * 1e4
    B[:, 1] = -1e4
    assert merge_into_(near, [(B, torch.ones(2, 24), 1.0)]) == 1.0
    assert torch.equal(near, before)


@pytest.mark.parametrize("dtype", ALL)
def test_check_finite_refuses_a_broken_adapter(dtype: torch.dtype) -> None:
    weight = torch.randn(20, 24).to(dtype)
    before = weight.clone()
    B, A = pair()
    B[3, 1] = torch.nan
    with pytest.raises(MergeError, match=r"24 of 480 elements.*factors or its scaling are not finite"):
        merge_into_(weight, [(B, A, 1.0)], check_finite=True)
    with pytest.raises(MergeError, match="not finite"):
        merge_into_(weight, [(*pair(), math.inf)], check_finite=True)
    assert torch.equal(weight, before)
    assert merge_into_(weight, [(*pair(), 1.0)], check_finite=True) > 0.5


@pytest.mark.parametrize("dtype", ALL)
def test_a_base_that_is_broken_already(dtype: torch.dtype) -> None:
    weight = torch.randn(20, 24).to(dtype)
    weight[0, 0], weight[1, 1] = torch.inf, torch.nan
    with pytest.raises(MergeError, match="2 elements of the base weight are NaN or infinite already"):
        merge_into_(weight, [(*pair(), 1.0)], check_finite=True)
    kept = merge_into_(weight, [(*pair(), 1.0)])
    assert math.isnan(kept) or dtype in (torch.float32, torch.float64)
    assert (~weight.isfinite()).sum() == 2


def test_what_does_not_fit_is_refused_with_all_its_shapes() -> None:
    B, A = pair()
    weight = torch.randn(20, 24)
    before = weight.clone()
    with pytest.raises(
        MergeError, match=r"term 1: B \(21, 4\) · A \(4, 24\) is not \(20, 24\); term 2: B \(20, 3\)"
    ):
        merge_into_(weight, [(B, A, 1.0), (torch.ones(21, 4), A, 1.0), (torch.ones(20, 3), A, 1.0)])
    with pytest.raises(MergeError, match=r"is not \(24, 20\)"):
        merge_into_(weight, [(B, A, 1.0)], transpose=True)
    with pytest.raises(MergeError, match="3 dimensions"):
        merge_into_(torch.randn(2, 20, 24), [(B, A, 1.0)])
    with pytest.raises(MergeError, match="quantised"):
        merge_into_(torch.zeros(20, 24, dtype=torch.uint8), [(B, A, 1.0)])
    with pytest.raises(MergeError, match=r"shape \(24, 20\)"):
        merge_dense(weight, torch.zeros(24, 20))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", ALL)
def test_merge_dense_leaves_the_weight_alone(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 4, 5).to(dtype)
    before, update = weight.clone(), coarse(3, 4, 5)
    merged, kept = merge_dense(weight, update)
    assert torch.equal(weight, before) and merged.dtype == dtype
    assert torch.equal(merged, (weight.double() + update.double()).to(dtype)) or dtype == torch.float32
    assert_close(merged, weight.double() + update)
    assert 0.9 < kept <= 1.0
    assert merge_dense(weight, torch.zeros(3, 4, 5))[1] == 1.0


FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu]


@pytest.mark.parametrize("dtype", [*ALL, *FLOAT8], ids=str)
def test_finite_is_what_holds_neither_nan_nor_infinity(dtype: torch.dtype) -> None:
    ends = torch.finfo(dtype)
    values = torch.tensor([1.0, ends.max, ends.min if dtype in ALL else 1.0], dtype=torch.float64).to(dtype)
    assert is_finite(values)
    for broken in (math.nan, math.inf, -math.inf):
        if torch.tensor(broken).to(dtype).double().isfinite():
            continue
        assert not is_finite(torch.cat([values, torch.tensor([broken]).to(dtype)]))


def test_integers_and_nothing_are_finite() -> None:
    assert is_finite(torch.tensor([1, 2])) and is_finite(torch.tensor([True])) and is_finite(torch.empty(0))
