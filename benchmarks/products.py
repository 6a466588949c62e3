"""Which order of the thin products, and which form of dropout, is the faster one?

`veneer.ops` decides both by dtype, size and probability. A row above 1 says that this machine would rather
have the other one; it decides what is faster, never what is right, so there are no bars.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import THREADS, Report, Row, question, ratio, take_turns, timed

TOKENS, RANK = 1024, 16
WIDTHS = (576, 1536, 4096)


def outer(factor: str, dtype: torch.dtype, width: int) -> dict[str, Callable[[], Any]]:
    """The gradient of a factor, in its layout, as it is computed for that dtype, and the other way round."""
    thin, wide = torch.randn(TOKENS, RANK).to(dtype), torch.randn(TOKENS, width).to(dtype)
    ways: list[Callable[[], Any]] = [
        lambda: thin.t() @ wide if factor == "A" else (thin.t() @ wide).t().contiguous(),
        lambda: wide.t() @ thin if factor == "B" else (wide.t() @ thin).t().contiguous(),
    ]
    wide_first = factor == "B" and dtype == torch.float32
    return dict(zip(("chosen", "other"), reversed(ways) if wide_first else ways, strict=True))


def dropout(p: float) -> dict[str, Callable[[], Any]]:
    """Zeroing by positions and by a mask, drawing included."""
    from veneer.ops.dropout import DENSE_FROM, drop_positions, zero_dropped_

    x = torch.randn(TOKENS, 1536)
    ways: list[Callable[[], Any]] = [
        lambda: zero_dropped_(x.clone(), drop_positions(x.numel(), p)),
        lambda: zero_dropped_(x.clone(), torch.rand(x.numel()) >= p),
    ]
    return dict(zip(("chosen", "other"), ways if p < DENSE_FROM else reversed(ways), strict=True))


def measure(quick: bool) -> Report:
    torch.set_num_threads(THREADS)
    cases = {
        f"gradient of {factor}, {str(dtype).removeprefix('torch.')}, {RANK} × {width}": outer(
            factor, dtype, width
        )
        for factor in "AB"
        for dtype in (torch.float32, torch.bfloat16)
        for width in WIDTHS
    }
    cases |= {f"dropout, p = {p}, {TOKENS} × 1536": dropout(p) for p in (0.05, 0.1, 0.3, 0.7)}
    rows = []
    for label, ways in cases.items():
        sides = {name: timed(call, times=3) for name, call in ways.items()}
        found = take_turns(sides, rounds=11 if quick else 41, warm_up=3)
        rows.append(Row(f"{label}: chosen ÷ other", ratio(found["chosen"], found["other"])))
    return Report(question(__doc__), rows, {"tokens": TOKENS})
