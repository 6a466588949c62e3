"""Sparse dropout: the law of the positions, repetition by seed, and both forms of a draw."""

from __future__ import annotations

import math

import pytest
import torch

from tests.unit.ops.cases import keep_mask
from veneer.ops import dropout
from veneer.ops.dropout import (
    DENSE_FROM,
    draw,
    drop_positions,
    packed,
    unpacked,
    zero_dropped_,
)

#: Two-sided false-alarm rate of one z-test at this bound: 5.7e-7. About 100 are made: 6e-5 in all, if the
#: seeds were drawn anew; they are fixed, so that a failure is a change of the code and never bad luck.
Z_BOUND = 5.0
TRIALS, NUMEL = 300, 20_000
PROBABILITIES = [0.001, 0.05, 0.1, 0.3, 0.7, 0.95]


def dropped(p: float) -> torch.Tensor:
    """(TRIALS, NUMEL) of 0 and 1 in float64: where independent calls drop."""
    torch.manual_seed(1234)
    found = torch.zeros(TRIALS, NUMEL, dtype=torch.float64)
    for row in found:
        row[drop_positions(NUMEL, p).long()] = 1.0
    return found


@pytest.mark.parametrize("p", PROBABILITIES)
def test_the_positions_are_independent_bernoulli_trials(p: float) -> None:
    X = dropped(p)
    scores = {"total": (X.sum() - X.numel() * p) / math.sqrt(X.numel() * p * (1 - p))}
    centred = (X - p) / math.sqrt(p * (1 - p))
    for lag in (1, 2, 3, 7, 64, 1000):  # products of centred neighbours: mean 0, variance 1, uncorrelated
        products = centred[:, :-lag] * centred[:, lag:]
        scores[f"lag {lag}"] = products.sum() / math.sqrt(products.numel())
    between = centred[:-1] * centred[1:]
    scores["successive calls"] = between.sum() / math.sqrt(between.numel())
    # Marginals along the tensor, the very first and last elements among them.
    for name, part in {"first": X[:, :10], "last": X[:, -10:], "middle": X[:, 9_000:11_000]}.items():
        scores[name] = (part.sum() - part.numel() * p) / math.sqrt(part.numel() * p * (1 - p))
    # The spread of the counts per call: sample variance of TRIALS counts, nearly normal.
    spread = X.sum(1).var() / (NUMEL * p * (1 - p))
    scores["variance"] = (spread - 1.0) / math.sqrt(2.0 / (TRIALS - 1))
    outside = {name: float(z) for name, z in scores.items() if not abs(z) < Z_BOUND}
    assert not outside


@pytest.mark.parametrize("p", [0.05, 0.3])
def test_the_gaps_are_geometric(p: float) -> None:
    torch.manual_seed(99)
    gaps = drop_positions(2_000_000, p).diff().double()
    count = gaps.numel()
    for k in range(1, 12):
        expected = p * (1 - p) ** (k - 1)
        z = ((gaps == k).sum() - count * expected) / math.sqrt(count * expected * (1 - expected))
        assert abs(z) < Z_BOUND, k


@pytest.mark.parametrize("p", [0.0, 1e-300, 1e-12, 1e-3, 0.004, 0.05, 0.3, 0.5, 0.9, 0.999999, 1.0])
@pytest.mark.parametrize("numel", [0, 1, 2, 17, 5000])
def test_positions_ascend_and_lie_inside(numel: int, p: float) -> None:
    found = drop_positions(numel, p)
    assert found.dtype == torch.int64 and found.dim() == 1
    if found.numel():
        assert found[0] >= 0 and found[-1] < numel
    assert (found.long().diff() > 0).all()
    if p in (0.0, 1.0):
        assert found.numel() == numel * p


def test_positions_beyond_31_bits() -> None:
    found = drop_positions(2**32, 1e-5)
    assert found.dtype == torch.int64
    assert found[-1] >= 2**31 and found[-1] < 2**32 and (found.diff() > 0).all()
    above = (found >= 2**31).sum()
    assert abs(above - 2**31 * 1e-5) < Z_BOUND * math.sqrt(2**31 * 1e-5)


@pytest.mark.parametrize("numel", [2**31 - 1, 2**31])
def test_positions_are_kept_in_32_bits_where_they_fit(numel: int) -> None:
    found = torch.tensor([0, 7, numel - 1])
    kept = packed(found, numel)
    assert kept.dtype == (torch.int32 if numel < 2**31 else torch.int64)
    assert torch.equal(unpacked(kept), found)


def test_a_mask_is_kept_as_it_is() -> None:
    mask = torch.tensor([True, False])
    assert packed(mask, 2) is mask and unpacked(mask) is mask


@pytest.mark.parametrize("drawn", [0.0, 1.0 - 2**-24])
def test_the_ends_of_what_rand_returns(drawn: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """rand() does return exactly 0: the shortest gap, then; its largest value is the longest gap."""
    monkeypatch.setattr(torch, "rand", lambda n, dtype, **given: torch.full((n,), drawn, dtype=dtype))
    found = drop_positions(5000, 0.05)
    longest = math.floor(math.log(2**-24) / math.log1p(-0.05)) + 1
    step = 1 if drawn == 0.0 else longest
    assert torch.equal(found.long(), torch.arange(step - 1, 5000, step))


def test_more_is_drawn_when_the_first_draw_falls_short(monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = dropout._running_gaps, []

    def short(numel: int, p: float, generator: torch.Generator | None) -> torch.Tensor:
        calls.append(numel)
        return original(numel, p, generator)[:100]

    monkeypatch.setattr(dropout, "_running_gaps", short)
    found = drop_positions(50_000, 0.05).long()
    assert len(calls) > 10
    assert (found.diff() > 0).all() and found[-1] < 50_000
    assert abs(found.numel() - 2500) < Z_BOUND * math.sqrt(50_000 * 0.05 * 0.95)


@pytest.mark.parametrize("p", [-0.01, 1.01, float("nan"), float("inf")])
def test_what_is_no_probability_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match="probability"):
        drop_positions(10, p)


def test_the_seed_repeats_the_positions() -> None:
    torch.manual_seed(7)
    first, second = drop_positions(10_000, 0.1), drop_positions(10_000, 0.1)
    torch.manual_seed(7)
    assert torch.equal(drop_positions(10_000, 0.1), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("numel", "p"), [(8192, 0.1), (8192, 0.8), (100, 0.1)])
def test_both_forms_drop_the_right_share(numel: int, p: float) -> None:
    drop = draw(torch.empty(numel), p)
    assert (drop.dtype == torch.bool) == (p >= DENSE_FROM or numel < dropout.SPARSE_FROM_NUMEL)
    kept = zero_dropped_(torch.ones(numel), drop)
    assert torch.equal(kept.bool(), keep_mask(kept, drop))
    assert abs(kept.sum() - numel * (1 - p)) < Z_BOUND * math.sqrt(numel * p * (1 - p))


def test_a_default_device_changes_no_dropout() -> None:
    torch.manual_seed(3)
    expected = drop_positions(10_000, 0.1)
    torch.manual_seed(3)
    with torch.device("meta"):
        assert torch.equal(drop_positions(10_000, 0.1), expected)
