"""What do rows of one batch through different adapters cost, beyond the base model?

It is measured beside PEFT, and beside one adapter for all rows.

A decode step is one of `generate`, timed from token to token; a prefill is one forward without a cache. The
time above the base model's own is what is compared. ``python -m benchmarks.mixed_batch --fit`` measures the
prices in `veneer.ops.mixed_batch`.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks._models import adapted, library, llama
from benchmarks._pictures import COLOURS, picture
from benchmarks.harness import THREADS, Figure, Report, Row, question, ratio, take_turns

VOCABULARY, LENGTH, TOKENS = 1024, 32, 6
#: Adapters in a batch of sixteen rows, for the picture.
COUNTS = (1, 2, 4, 8, 16)
ABOVE = "adapters by turns in 16 rows, fp32 decode, above base"


def models(dtype: Any, adapters: int) -> dict[str, Any]:
    """The base model, and the same with so many adapters, in both libraries."""
    found = {"base": llama(576, 30, dtype, head=True, vocabulary=VOCABULARY)}
    for side in ("veneer", "PEFT"):
        plain = llama(576, 30, dtype, head=True, vocabulary=VOCABULARY)
        found[side] = model = adapted(side, plain, adapter_name="0", task_type="CAUSAL_LM")
        for number in range(1, adapters):
            model.add_adapter(str(number), model.peft_config["0"])
    return {name: model.eval() for name, model in found.items()}


def decode(model: Any, ids: Any, **more: Any) -> float:
    """Seconds of one step of `generate`: the median over its tokens."""
    import torch
    from transformers import StoppingCriteria

    class Stamp(StoppingCriteria):  # type: ignore[misc]
        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
            self.times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

    stamp = Stamp()
    options = {"max_new_tokens": TOKENS + 2, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    model.generate(input_ids=ids, stopping_criteria=[stamp], **options, **more)
    # The second step makes what the others find ready.
    return statistics.median(b - a for a, b in zip(stamp.times[1:], stamp.times[2:], strict=False))


def prefill(model: Any, ids: Any, **more: Any) -> float:
    """Seconds of one forward."""
    start = time.perf_counter()
    model(input_ids=ids, use_cache=False, **more)
    return time.perf_counter() - start


def beyond(found: dict[str, list[float]], side: str) -> list[float]:
    """Seconds above the base's, turn by turn."""
    return [a - b for a, b in zip(found[side], found["base"], strict=True)]


def eight_rows(dtype: Any, rounds: int) -> list[Row]:
    """Eight rows of eight adapters."""
    import torch

    held = models(dtype, 8)
    ids = torch.randint(0, VOCABULARY, (8, LENGTH))
    names = {"adapter_names": [str(row) for row in range(8)]}
    rows = []
    for what, measured, bar in (("decode", decode, 0.2), ("prefill", prefill, 0.4)):
        sides = {
            "base": partial(measured, held["base"], ids),
            "one": partial(measured, held["veneer"], ids),
            "veneer": partial(measured, held["veneer"], ids, **names),
            "PEFT": partial(measured, held["PEFT"], ids, **names),
        }
        found = take_turns(sides, rounds=rounds)
        label = f"{str(dtype).removeprefix('torch.')} {what}"
        ours, theirs = beyond(found, "veneer"), beyond(found, "PEFT")
        rows += [
            Row(f"{label}: above base ÷ PEFT's", ratio(ours, theirs), at_most=bar),
            Row(
                f"{label}: total ÷ one Veneer adapter's",
                ratio(found["veneer"], found["one"]),
                at_most=1.3,
                beside={"PEFT": ratio(found["PEFT"], found["one"])},
            ),
            Row(f"{label}: above base", milliseconds(ours), "ms", beside={"PEFT": milliseconds(theirs)}),
        ]
    return rows


def by_count(rounds: int) -> list[Row]:
    """A decode step of sixteen rows against the number of adapters."""
    import torch

    held = models(torch.float32, max(COUNTS))
    ids = torch.randint(0, VOCABULARY, (16, LENGTH // 4))  # the prompt is not what is timed
    sides: dict[str, Callable[[], float]] = {"base": partial(decode, held["base"], ids)}
    for count in COUNTS:
        names = {"adapter_names": [str(row % count) for row in range(16)]}
        for side in ("veneer", "PEFT"):
            sides[f"{side} {count}"] = partial(decode, held[side], ids, **names)
    found = take_turns(sides, rounds=rounds)
    return [
        Row(
            f"{count} {ABOVE}",
            milliseconds(beyond(found, f"veneer {count}")),
            "ms",
            beside={"PEFT": milliseconds(beyond(found, f"PEFT {count}"))},
        )
        for count in COUNTS
    ]


def milliseconds(seconds: Sequence[float]) -> Figure:
    return Figure.of([1e3 * value for value in seconds])


def measure(quick: bool) -> Report:
    import torch

    torch.set_num_threads(THREADS)
    with torch.no_grad():
        rows = [r for d in (torch.float32, torch.bfloat16) for r in eight_rows(d, 2 if quick else 5)]
        rows += by_count(2)
    conditions = {
        "model": "Llama-shaped, hidden 576, 30 layers, r = 16 on all 210 linears",
        "decode": f"8 rows, a cache of {LENGTH} to {LENGTH + TOKENS} positions, in generate",
        "prefill": f"8 rows of {LENGTH} tokens",
        "libraries": [library(side).__name__ for side in ("veneer", "PEFT")],
    }
    return Report(question(__doc__), rows, conditions)


def draw(report: Report, path: Path) -> None:
    """The time above the base model's against the number of adapters."""
    rows = [row for row in report.rows if row.label.endswith(ABOVE)]
    title = "One token of 16 rows: time above the base model's own"
    with picture(path, title, "adapters in the batch", "ms above base") as axes:
        if axes is None:
            return
        for side in ("PEFT", "veneer"):
            figures = [row.ours if side == "veneer" else row.beside[side] for row in rows]
            middle = [f.median for f in figures]
            axes.plot(COUNTS, middle, "o-", color=COLOURS[side], label=side)
            axes.fill_between(
                COUNTS, [f.low for f in figures], [f.high for f in figures], color=COLOURS[side], alpha=0.2
            )
            axes.annotate(
                side, (COUNTS[-1], middle[-1]), xytext=(6, 0), textcoords="offset points", va="center"
            )
        axes.set(xticks=COUNTS, ylim=(0, None))


# -- the prices of `veneer.ops.mixed_batch` --------------------------------------------------------------


def fit() -> dict[int, Any]:
    """Microseconds for one of each of `Amounts`, by bytes of an element: least squares of relative errors."""
    import torch

    from veneer.ops.mixed_batch import Amounts

    torch.set_num_threads(THREADS)
    prices = {}
    for dtype in (torch.float32, torch.bfloat16):
        taken, seconds = [], []
        with torch.no_grad():
            for rows, adapters, length in (
                (8, 8, 1), (8, 2, 1), (32, 4, 1), (64, 8, 1),
                (8, 8, 32), (8, 2, 32), (16, 4, 64), (32, 8, 16),
            ):  # fmt: skip
                if dtype is torch.bfloat16 and rows * length <= 64:
                    continue  # computed in float32
                for amount, measured in _ways(dtype, rows, adapters, length):
                    taken.append(amount)
                    seconds.append(measured)
        a, b = torch.tensor(taken, dtype=torch.float64), torch.tensor(seconds, dtype=torch.float64) * 1e6
        x = torch.full((4,), 1.0, dtype=torch.float64)
        scaled, ones = a / b[:, None], torch.ones(len(b), dtype=torch.float64)
        for _ in range(20_000):  # non-negative least squares, by multiplicative steps
            x = x * (scaled.t() @ ones) / (scaled.t() @ (scaled @ x)).clamp_min(1e-12)
        print(dtype, "error", (scaled @ x - 1).abs().mean().item())
        prices[dtype.itemsize] = Amounts(*(float(f"{value:.2g}") for value in x.tolist()))
    return prices


def _ways(dtype: Any, rows: int, adapters: int, length: int) -> list[tuple[Any, float]]:
    """What each way takes, and its seconds for one layer, with factors that no cache holds."""
    import torch

    from veneer.ops import mixed_batch as ops

    shapes = [(576, 576), (576, 192), (576, 1536), (1536, 576)]

    def random(*shape: int) -> Any:
        return torch.randn(*shape).to(dtype)

    layers = [
        (
            random(rows, length, i),
            random(rows, length, o),
            {str(n): (random(16, i), random(o, 16), 2.0) for n in range(adapters)},
        )
        for i, o in shapes * 16
    ]
    ranks = dict.fromkeys(map(str, range(adapters)), 16)
    found = []
    for layout, kept in product(ops.layouts([str(row % adapters) for row in range(rows)]), (True, False)):
        sums = [ops.amounts(layout, length, ranks, i + o, kept) for i, o in shapes]
        order = None if layout.order is None else torch.tensor(layout.order)
        for way in ("groups", "runs"):
            if way == "runs" and not kept:
                continue

            def made(terms: Any, way: str = way, layout: Any = layout, order: Any = order) -> Any:
                if way == "runs":
                    whole = partial(ops.by_runs, terms=terms, runs=layout.runs)
                else:
                    a, b, scales = ops.stacked([terms[n] for n in layout.groups], dtype)
                    whole = partial(ops.by_groups, a=a, b=b, scales=scales)
                return whole if order is None else partial(ops.laid_together, way=whole, order=order)

            ready = [made(terms) for _, _, terms in layers] if kept else [None] * len(layers)

            def run(made: Any = made, ready: Any = ready) -> float:
                start = time.perf_counter()
                for (x, y, terms), one in zip(layers, ready, strict=True):
                    (made(terms) if one is None else one)(x, y)
                return (time.perf_counter() - start) / len(layers)

            seconds = statistics.median(run() for _ in range(5))
            mean = ops.Amounts(*(statistics.mean(s[way][k] for s in sums) for k in range(4)))
            what = way if order is None else f"{way} together"
            print(
                str(dtype),
                rows,
                adapters,
                length,
                what,
                "kept" if kept else "made",
                f"{seconds * 1e6:.0f} µs",
            )
            found.append((mean, seconds))
    return found


if __name__ == "__main__" and "--fit" in sys.argv:
    for width, price in fit().items():
        print(width, price)
