"""What do merging and unmerging cost beside the reference, and what does an undo keep and give back?

Both libraries in turns, each on a model of its own with the same weights. `merge_and_unload` takes the
adapter away, so the model gets a new one before each turn, which is not timed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._models import LINEARS, adapted, llama
from benchmarks.harness import THREADS, Figure, Report, Row, question, ratio, take_turns

HIDDEN, LAYERS = 576, 30
#: Norm of an update, in norms of the weight that it is merged into.
UPDATE = 0.01
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIDES = ("veneer", "PEFT")


def seconds(call: Callable[[], Any]) -> float:
    """Wall time; the collector of garbage of earlier turns waits, as in `timeit`."""
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    call()
    took = time.perf_counter() - start
    gc.enable()
    return took


@torch.no_grad()
def small(model: Any) -> Any:
    """The model with updates of the size that training gives: `UPDATE` of the norm of their weight."""
    for module in model.modules():
        if hasattr(module, "lora_B") and "default" in module.lora_B:
            delta = module.get_delta_weight("default").float().norm()
            module.lora_B["default"].weight *= UPDATE * module.weight.float().norm() / delta
    return model


def base_weights(model: nn.Module) -> list[Tensor]:
    """The weights that adapters are merged into."""
    return [
        parameter.detach()
        for name, parameter in model.named_parameters()
        if name.removesuffix(".base_layer.weight").rpartition(".")[2] in LINEARS
    ]


def back_and_forth(dtype: torch.dtype, rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Seconds of merge_adapter and of unmerge_adapter, by side."""
    models = {side: small(adapted(side, llama(HIDDEN, LAYERS, dtype))) for side in SIDES}
    unmerging: dict[str, list[float]] = {side: [] for side in SIDES}

    def one(side: str) -> float:
        took = seconds(models[side].merge_adapter)
        unmerging[side].append(seconds(models[side].unmerge_adapter))
        return took

    merging = take_turns({side: (lambda side=side: one(side)) for side in SIDES}, rounds=rounds)
    return merging, {side: unmerging[side][-rounds:] for side in SIDES}


def for_good(dtype: torch.dtype, rounds: int) -> dict[str, list[float]]:
    """Seconds of merge_and_unload, by side."""
    bases = {side: llama(HIDDEN, LAYERS, dtype) for side in SIDES}

    def one(side: str) -> float:
        model = small(adapted(side, bases[side]))
        return seconds(model.merge_and_unload)

    return take_turns({side: (lambda side=side: one(side)) for side in SIDES}, rounds=rounds)


def undone(dtype: torch.dtype, side: str) -> tuple[float, float]:
    """Share of the weights that merging and unmerging change, and bytes that the undo keeps per weight."""
    model = small(adapted(side, llama(HIDDEN, LAYERS, dtype)))
    before = [weight.clone() for weight in base_weights(model)]
    held = sum(buffer.nbytes for buffer in model.buffers())
    model.merge_adapter()
    kept = sum(buffer.nbytes for buffer in model.buffers()) - held
    model.unmerge_adapter()
    pairs = zip(base_weights(model), before, strict=True)
    changed = sum(int((now != old).sum()) for now, old in pairs)
    total = sum(weight.numel() for weight in before)
    return changed / total, kept / total


def compared(label: str, times: dict[str, list[float]], bar: float, ours: str = "veneer") -> tuple[Row, Row]:
    """Ours ÷ PEFT's with its bar, and the milliseconds of both."""
    milliseconds = {side: Figure.of([1e3 * t for t in taken]) for side, taken in times.items()}
    return (
        Row(f"{label} ÷ PEFT", ratio(times[ours], times["PEFT"]), at_most=bar),
        Row(label, milliseconds[ours], "ms", beside={"PEFT": milliseconds["PEFT"]}),
    )


def measure(quick: bool) -> Report:
    torch.set_num_threads(THREADS)
    rounds = 5 if quick else 9
    rows: list[Row] = []
    exact: list[Row] = []
    for name, dtype in DTYPES.items():
        merging, unmerging = back_and_forth(dtype, rounds)
        bar = 0.5 if dtype == torch.float32 else 0.75
        rows += compared(f"merge_and_unload, {name}", for_good(dtype, rounds), bar)
        rows += compared(f"merge_adapter, undo by copy, {name}", merging, 1.0)
        rows += compared(f"unmerge_adapter, {name}", unmerging, 0.5)
        changed, kept = undone(dtype, "veneer")
        theirs, _ = undone(dtype, "PEFT")
        exact.append(
            Row(
                f"weights changed by merging and unmerging, {name}",
                Figure.exact(100 * changed),
                "%",
                at_most=0,
                beside={"PEFT": Figure.exact(100 * theirs)},
            )
        )
        exact.append(Row(f"kept by the undo by copy, {name}", Figure.exact(kept), "bytes per weight"))
    conditions = {
        "model": f"Llama-shaped, {LAYERS} layers, hidden {HIDDEN}, {7 * LAYERS} linears, random weights",
        "adapter": f"r=16 on all linears, random factors in float32, updates of {UPDATE:.0%} of the weight",
        "rounds": rounds,
    }
    return Report(question(__doc__), [*rows, *exact], conditions)
