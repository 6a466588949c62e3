"""What does a training step cost beside the frozen model's own forward and backward?

The floor is the frozen base: its forward, and its backward to inputs that require a gradient, so that every
layer passes gradients on. Full fine-tuning, PEFT and Veneer do the same step with their gradients; optimizers
are left out, which favours full fine-tuning. All sides take turns in one process, each with a step of the
floor beside it; each row is the median of step ÷ that floor over the rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks._models import adapted, llama
from benchmarks.harness import THREADS, Figure, Report, Row, question, ratio, take_turns

#: hidden size, layers, dtype: (at most, aim) for dropout 0 and 0.05.
BARS: dict[tuple[int, int, str], dict[float, tuple[float, float]]] = {
    (576, 8, "float32"): {0.0: (1.14, 1.10), 0.05: (1.22, 1.15)},
    (576, 8, "bfloat16"): {0.0: (1.16, 1.12), 0.05: (1.26, 1.19)},
    (1536, 3, "float32"): {0.0: (1.07, 1.04), 0.05: (1.12, 1.08)},
    (1536, 3, "bfloat16"): {0.0: (1.11, 1.07), 0.05: (1.19, 1.12)},
}
BATCH, LENGTH = 4, 256


def step(model: Any, x: torch.Tensor, gradient: torch.Tensor) -> Callable[[], float]:
    """A function that takes one step and returns its seconds."""

    def measured() -> float:
        inputs = x.clone().requires_grad_(True)
        start = time.perf_counter()
        model(inputs_embeds=inputs).last_hidden_state.backward(gradient)
        seconds = time.perf_counter() - start
        model.zero_grad(set_to_none=True)
        return seconds

    return measured


def compare(hidden: int, layers: int, kind: str, rounds: int, *, dora: bool) -> list[Row]:
    dtype = getattr(torch, kind)

    def base() -> Any:
        return llama(hidden, layers, dtype).train()

    floor = base().requires_grad_(False)
    models: dict[str, Any] = {"full": base()}
    for p in BARS[hidden, layers, kind]:
        for side in ("veneer", "PEFT"):
            models[f"{side} {p}"] = adapted(side, base(), p=p).train()
    if dora:
        for side in ("veneer", "PEFT"):
            models[f"{side} dora"] = adapted(side, base(), use_dora=True).train()
    torch.manual_seed(1)
    x = torch.randn(BATCH, LENGTH, hidden).to(dtype)
    gradient = torch.randn_like(x)
    beside = step(floor, x, gradient)
    floors: dict[str, list[float]] = {name: [] for name in models}

    def paired(name: str) -> Callable[[], float]:
        own = step(models[name], x, gradient)

        def measured() -> float:
            before = len(floors[name]) % 2 == 0
            floors[name] += [beside()] if before else []
            seconds = own()
            floors[name] += [] if before else [beside()]
            return seconds

        return measured

    seconds = take_turns({name: paired(name) for name in models}, rounds=rounds, warm_up=1)

    def over(name: str, peer: str | None = None) -> Figure:
        return ratio(seconds[name], floors[name][1:] if peer is None else seconds[peer])

    what = f"{kind}, hidden {hidden}, {layers} layers"
    rows = []
    for p, (at_most, aim) in BARS[hidden, layers, kind].items():
        ours = f"veneer {p}"
        others = {"PEFT": over(f"PEFT {p}"), "full fine-tuning": over("full")}
        rows.append(Row(f"{what}, dropout {p}", over(ours), at_most=at_most, aim=aim, beside=others))
        rows.append(Row("  ÷ full fine-tuning", over(ours, "full"), at_most=1.0))
    if dora:
        rows.append(_dora_row(over))
    return rows


def _dora_row(over: Callable[[str, str], Figure]) -> Row:
    """The bar is on DoRA beside plain LoRA; both sides' plain LoRA differ."""
    ours, theirs = over("veneer dora", "veneer 0.0"), over("PEFT dora", "PEFT 0.0")
    return Row("  DoRA ÷ plain LoRA, dropout 0", ours, at_most=1.3, beside={"PEFT": theirs})


def measure(quick: bool) -> Report:
    torch.set_num_threads(THREADS)
    rows = []
    for hidden, layers, kind in BARS:
        small = hidden == 576
        rounds = (3 if small else 2) if quick else (7 if small else 4)
        rows += compare(hidden, layers, kind, rounds, dora=small and not quick)
    conditions = {
        "step": f"{BATCH} × {LENGTH} tokens, LoRA r=16 on every linear, forward and backward",
        "figures": "step ÷ floor, median (quartiles) over rounds in one process",
    }
    return Report(question(__doc__), rows, conditions)


def draw(report: Report, path: Path) -> None:
    from benchmarks._pictures import bars

    groups = {row.label: {"Veneer": row.ours, **row.beside} for row in report.rows if row.aim is not None}
    bars(path, groups, "A training step, as a multiple of the frozen model's own", floor=1.0)
