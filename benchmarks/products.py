"""Which order of the thin products, and which form of dropout, is the faster one?

`veneer.ops` decides both by dtype, size and probability. A row above 1 says that this machine would rather
have the other one; it decides what is faster, never what is right, so there are no bars.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import THREADS, Report, Row, question, ratio, take_turns, timed

TOKENS = 1024
RANKS = (8, 16)
WIDTHS = (576, 1536, 4096)


def products(what: str, dtype: torch.dtype, r: int, width: int) -> dict[str, Callable[[], Any]]:
    """``G B`` or the gradient of a factor, as they are computed for that dtype and the other way round."""
    thin, wide = torch.randn(TOKENS, r).to(dtype), torch.randn(TOKENS, width).to(dtype)
    B = torch.randn(width, r).to(dtype)
    thin_first: Callable[[], Any]
    wide_first: Callable[[], Any]
    if what == "G B":
        thin_first, wide_first = lambda: (B.t() @ wide.t()).t(), lambda: wide @ B
    elif what == "gradient of A":
        thin_first, wide_first = lambda: thin.t() @ wide, lambda: (wide.t() @ thin).t().contiguous()
    else:
        thin_first, wide_first = lambda: (thin.t() @ wide).t().contiguous(), lambda: wide.t() @ thin
    if what == "G B" and dtype == torch.bfloat16:
        return {"chosen": wide_first, "other": thin_first}
    return {"chosen": thin_first, "other": wide_first}


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
        f"{what}, {str(dtype).removeprefix('torch.')}, {r} × {width}": products(what, dtype, r, width)
        for what in ("G B", "gradient of A", "gradient of B")
        for dtype in (torch.float32, torch.bfloat16)
        for r in RANKS
        for width in WIDTHS
    }
    cases |= {f"dropout, p = {p}, {TOKENS} × 1536": dropout(p) for p in (0.05, 0.1, 0.3, 0.7)}
    rows = []
    for label, ways in cases.items():
        sides = {name: timed(call, times=3) for name, call in ways.items()}
        found = take_turns(sides, rounds=11 if quick else 41, warm_up=3)
        rows.append(Row(f"{label}: chosen ÷ other", ratio(found["chosen"], found["other"])))
    return Report(question(__doc__), rows, {"tokens": TOKENS})
