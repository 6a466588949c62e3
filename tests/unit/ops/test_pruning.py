"""Trimming and voting, entry by entry."""

from __future__ import annotations

import pytest
import torch

from tests.tolerances import assert_close
from veneer.errors import CombineError
from veneer.ops import pruning


def test_the_largest_entries_stay() -> None:
    t = torch.tensor([[3.0, -1.0], [0.5, -4.0]])
    assert pruning.combine([t], [2.0], "magnitude_prune", 0.5).tolist() == [[6.0, 0.0], [0.0, -8.0]]


def test_the_elected_sign_wins_and_only_who_agrees_counts() -> None:
    first, second, third = torch.tensor([3.0, 1.0]), torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -1.0])
    stack, weights = [first, second, third], [1.0, 2.0, 4.0]
    # Sums are 1 and -1: plus is elected for the first entry, minus for the second.
    assert pruning.combine(stack, weights, "ties", 1.0).tolist() == [3.0, -3.0]
    assert pruning.combine(stack, weights, "ties", 1.0, "frequency").tolist() == [-3.0, -3.0]


def test_random_dropping_keeps_the_mean() -> None:
    torch.manual_seed(0)
    t = torch.ones(200_000)
    kept = pruning.combine([t], [1.0], "dare_linear", 0.25)
    assert set(kept.unique().tolist()) == {0.0, 4.0}
    # Five standard deviations of the mean of 200,000 draws of 0 or 4: false alarm below one in a million.
    assert abs(float(kept.mean()) - 1) < 5 * (3 / 200_000) ** 0.5


@pytest.mark.parametrize("method", list(pruning.METHODS))
def test_nothing_and_everything(method: str) -> None:
    t = torch.randn(4, 5)
    assert not pruning.combine([t], [1.0], method, 0).any()
    assert_close(pruning.combine([t], [1.0], method, 1), t)


def test_everything_wrong_is_said_at_once() -> None:
    with pytest.raises(CombineError, match=r"none of ties.*from 0 to 1.*majority_sign_method"):
        pruning.combine([torch.ones(2)], [1.0], "vote", -1, "loudest")
