"""What does loading an adapter take on a 30-layer model, and does the 50th take longer than the 2nd?

LoRA r=16 on all 210 linears, a safetensors file in the page cache, a base in evaluation as `from_pretrained`
gives it. The bar in milliseconds, 50 where PEFT took 232, is kept as a ratio: machines differ.
"""

from __future__ import annotations

import gc
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks._models import adapted, fresh, library, llama
from benchmarks.harness import THREADS, Figure, Report, Row, question, ratio, take_turns

SIDES = ("veneer", "PEFT")
BAR = 50 / 232
NTH = 50


def load(side: str, base: Any, place: Path) -> float:
    """Seconds of `PeftModel.from_pretrained` on a fresh model."""
    model, lora = fresh(base), library(side)
    gc.collect()
    start = time.perf_counter()
    lora.PeftModel.from_pretrained(model, place)
    return time.perf_counter() - start


def save(model: Any, place: Path) -> float:
    """Seconds of `save_pretrained`."""
    start = time.perf_counter()
    model.save_pretrained(place)
    return time.perf_counter() - start


def many(side: str, base: Any, place: Path, count: int) -> list[float]:
    """Seconds of each `load_adapter`, from the second adapter of a model to the last."""
    model = library(side).PeftModel.from_pretrained(fresh(base), place)
    times = []
    for number in range(2, count + 1):
        gc.collect()
        start = time.perf_counter()
        model.load_adapter(place, f"number{number}")
        times.append(time.perf_counter() - start)
    return times


def measure(quick: bool) -> Report:
    torch.set_num_threads(THREADS)
    rows = []
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        base = llama(576, 30, dtype).eval()
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            saved = {side: adapted(side, fresh(base)) for side in SIDES}
            written = take_turns(
                {side: partial(save, model, place / side) for side, model in saved.items()},
                rounds=3 if quick else 7,
            )
            del saved
            sides = {side: partial(load, side, base, place / "PEFT") for side in SIDES}
            times = take_turns(sides, rounds=5 if quick else 9)
            rows += [
                Row(f"{name}: from_pretrained ÷ PEFT's", ratio(times["veneer"], times["PEFT"]), at_most=BAR),
                _milliseconds(f"{name}: from_pretrained", times),
                _milliseconds(f"{name}: save_pretrained", written),
            ]
            if name == "bf16":
                rows.append(_nth(base, place / "PEFT"))
    conditions = {
        "model": "Llama-shaped, hidden 576, 30 layers, 210 linears",
        "adapter": "r=16, 420 fp32 tensors, written by PEFT",
    }
    return Report(question(__doc__), rows, conditions)


def _milliseconds(label: str, times: dict[str, list[float]]) -> Row:
    figures = {side: Figure.of([1000 * t for t in seconds]) for side, seconds in times.items()}
    return Row(label, figures.pop("veneer"), "ms", beside=figures)


def _nth(base: Any, place: Path) -> Row:
    """The last loads ÷ the first into one model; of PEFT only ten, to be done soon."""
    grown = _growth(many("veneer", base, place, NTH))
    theirs = _growth(many("PEFT", base, place, 10))
    return Row(
        f"load_adapter: the {NTH}th ÷ the 2nd",
        Figure.of([grown]),
        at_most=1.2,
        beside={"PEFT, the 10th": Figure.of([theirs])},
    )


def _growth(times: list[float]) -> float:
    """The last ÷ the first, each the median of neighbours: five, three where there are few."""
    count = 5 if len(times) >= 10 else 3
    return median(times[-count:]) / median(times[:count])
