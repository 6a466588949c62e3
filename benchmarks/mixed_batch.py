"""What do rows of one batch through different adapters cost, beyond the base model?

It is measured beside PEFT, and beside one adapter for all rows.

A decode step is one of `generate`, timed from token to token; a prefill is one forward without a cache. The
time above the base model's own is what is compared.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
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
