"""Few combinations with all pairs of the many: most faults take two choices to show, and hardly one three."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest

Row = tuple[Any, ...]


def pairwise(rows: Iterable[Row], first: Iterable[Row] = ()) -> set[Row]:
    """Rows in which every pair of values occurs that occurs in any row; the same ones each time.

    Args:
        rows: One combination each, with a value in each place.
        first: Rows that are among them anyway.
    """
    pairs = {row: frozenset(itertools.combinations(enumerate(row), 2)) for row in rows}
    chosen = set(first)
    covered = set().union(*(pairs[row] for row in chosen))
    # Greedily: first the rows that bring the most new pairs.
    for least in range(max(map(len, pairs.values()), default=0), 0, -1):
        for row, its_own in pairs.items():
            if len(its_own - covered) >= least:
                chosen.add(row)
                covered |= its_own
    return chosen


def combined(*choices: Iterable[Any]) -> list[Any]:
    """All combinations of the choices as parameters for tests; those beyond a pairwise cover are slow."""
    rows = list(itertools.product(*choices))
    short = pairwise(rows)
    return [pytest.param(*row, marks=() if row in short else pytest.mark.slow) for row in rows]
