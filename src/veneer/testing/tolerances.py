"""How far two results of the same formula may lie apart, by dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    """How far two results may lie apart, and why that much."""

    rtol: float
    atol: float
    reason: str

    @property
    def kwargs(self) -> dict[str, float]:
        return {"rtol": self.rtol, "atol": self.atol}


#: Same formula, other order of summation: a few units in the last place of sums of some hundred terms.
BY_DTYPE: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(1e-10, 1e-11, "eps 2.2e-16; sums of up to 1e3 terms, nested a few deep"),
    torch.float32: Tolerance(1e-4, 2e-5, "eps 1.2e-7; sums of up to 1e3 terms, nested a few deep"),
    torch.bfloat16: Tolerance(
        2e-2, 2e-2, "eps 7.8e-3: intermediates are rounded to 8 bits, two or three times"
    ),
    torch.float16: Tolerance(
        4e-3, 4e-3, "eps 9.8e-4: intermediates are rounded to 11 bits, two or three times"
    ),
}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance | None = None) -> None:
    """Assert equality within `tolerance`, by default that of the coarser dtype of the two."""
    if tolerance is None:
        coarser = max((actual.dtype, expected.dtype), key=lambda dtype: torch.finfo(dtype).eps)
        tolerance = BY_DTYPE[coarser]
    torch.testing.assert_close(actual, expected, rtol=tolerance.rtol, atol=tolerance.atol, check_dtype=False)
