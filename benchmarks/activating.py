"""What does `set_adapter` take among 2 and among 10 adapters of a 30-layer model?

LoRA r=16 on all 210 linears; each turn goes from one adapter to another and back. The bars in milliseconds, 2
and 3 where PEFT took 16, are kept as ratios: machines differ.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks._models import LINEARS, fresh, library, llama
from benchmarks.harness import THREADS, Figure, Report, Row, question, ratio, take_turns, timed

SIDES = ("veneer", "PEFT")
BARS = {2: 2 / 16, 10: 3 / 16}
#: Switches in one measurement.
SWITCHES = 10


def with_adapters(side: str, base: Any, count: int) -> Any:
    """The model with so many adapters, named by their numbers."""
    lora = library(side)
    config = lora.LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS)
    model = lora.get_peft_model(fresh(base), config, adapter_name="a0")
    for number in range(1, count):
        model.add_adapter(f"a{number}", config)
    return model


def switch(model: Any, count: int) -> None:
    """To the last adapter and back, over and over."""
    for number in range(SWITCHES):
        model.set_adapter("a0" if number % 2 else f"a{count - 1}")


def measure(quick: bool) -> Report:
    torch.set_num_threads(THREADS)
    base = llama(576, 30, torch.bfloat16)
    rows = []
    for count, bar in BARS.items():
        models = {side: with_adapters(side, base, count) for side in SIDES}
        sides = {side: timed(partial(switch, model, count)) for side, model in models.items()}
        times = take_turns(sides, rounds=9 if quick else 31)
        figures = {side: Figure.of([1000 * t / SWITCHES for t in seconds]) for side, seconds in times.items()}
        label = f"among {count}: set_adapter"
        rows += [
            Row(f"{label} ÷ PEFT's", ratio(times["veneer"], times["PEFT"]), at_most=bar),
            Row(label, figures["veneer"], "ms", beside={"PEFT": figures["PEFT"]}),
        ]
    return Report(question(__doc__), rows, {"model": "Llama-shaped, hidden 576, 30 layers, 210 linears"})
