"""What does `get_peft_model` take on a 30-layer model with 210 linears, in time and in memory?

LoRA r=16 on every linear, values drawn; the model is a fresh one at each turn, made outside of what is timed.
The bars in milliseconds, 50 where PEFT took 186, are kept as ratios: machines differ.
"""

from __future__ import annotations

import gc
import time
from functools import partial
from typing import Any

import torch

from benchmarks._models import LINEARS, fresh, library, llama
from benchmarks.harness import (
    THREADS,
    Figure,
    Report,
    Row,
    in_fresh_process,
    memory,
    question,
    ratio,
    take_turns,
)

SIDES = ("veneer", "PEFT")
BAR = 50 / 186
R = 16


def config(side: str) -> Any:
    """LoRA on every linear, as either library spells it."""
    return library(side).LoraConfig(r=R, lora_alpha=2 * R, target_modules=LINEARS)


def wrap(side: str, base: Any) -> float:
    """Seconds of `get_peft_model` on a fresh model."""
    model, adapter, lora = fresh(base), config(side), library(side)
    gc.collect()
    start = time.perf_counter()
    lora.get_peft_model(model, adapter)
    return time.perf_counter() - start


def peak_over_adapter(side: str) -> float:
    """Peak of the process's memory above that before wrapping ÷ the adapter; in a process of its own."""
    torch.set_num_threads(THREADS)
    lora = library(side)
    lora.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), lora.LoraConfig(target_modules=["0"]))
    model, adapter = llama(576, 30, torch.float32), config(side)
    gc.collect()
    before = memory("VmRSS")
    wrapped = lora.get_peft_model(model, adapter)
    grown = memory("VmHWM") - before
    return grown / sum(p.numel() * p.element_size() for n, p in wrapped.named_parameters() if "lora_" in n)


def measure(quick: bool) -> Report:
    torch.set_num_threads(THREADS)
    rows = []
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        base = llama(576, 30, dtype)
        times = take_turns({side: partial(wrap, side, base) for side in SIDES}, rounds=5 if quick else 15)
        own = Figure.of([1000 * t for t in times["veneer"]])
        theirs = Figure.of([1000 * t for t in times["PEFT"]])
        rows += [
            Row(f"{name}: wrapping ÷ PEFT's", ratio(times["veneer"], times["PEFT"]), at_most=BAR),
            Row(f"{name}: wrapping", own, "ms", beside={"PEFT": theirs}),
        ]
    grown = {side: Figure.of([in_fresh_process(peak_over_adapter, side=side)]) for side in SIDES}
    rows.append(Row("fp32: growth of peak memory ÷ adapter", grown["veneer"], beside={"PEFT": grown["PEFT"]}))
    conditions = {"model": "Llama-shaped, hidden 576, 30 layers, 210 linears", "adapter": f"r={R}, fp32"}
    return Report(question(__doc__), rows, conditions)
