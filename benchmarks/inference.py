"""What does an adapter cost in inference, merged and unmerged, beside the base model alone?

Ratios to the base model's own time: one decode step with a KV cache, and a prefill without one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks._models import adapted, llama
from benchmarks.harness import THREADS, Report, Row, question, ratio, take_turns, timed

VOCABULARY, LENGTH = 1024, 32


def models(dtype: Any) -> dict[str, Any]:
    """The base, and with one adapter: merged, unmerged, unmerged in PEFT."""
    found = {}
    for side in ("base", "merged", "unmerged", "PEFT"):
        model = llama(576, 30, dtype, head=True, vocabulary=VOCABULARY)
        if side != "base":
            model = adapted("PEFT" if side == "PEFT" else "veneer", model, task_type="CAUSAL_LM")
        if side == "merged":
            model.merge_adapter()
        found[side] = model.eval()
    return found


def step(model: Any, ids: Any, cache: Any) -> None:
    """One token more for each row, and the cache as it was."""
    model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    cache.crop(-1)


def of_dtype(dtype: Any, batch: int, rounds: int) -> list[Row]:
    """Decode and prefill of a batch."""
    import torch

    held = models(dtype)
    ids = torch.randint(0, VOCABULARY, (batch, LENGTH))
    caches = {side: model(input_ids=ids, use_cache=True).past_key_values for side, model in held.items()}
    kinds = {
        "decode": {
            side: timed(partial(step, model, ids, caches[side]), times=4) for side, model in held.items()
        },
        "prefill": {
            side: timed(partial(model, input_ids=ids, use_cache=False)) for side, model in held.items()
        },
    }
    rows = []
    for kind, sides in kinds.items():
        found = take_turns(sides, rounds=rounds, warm_up=2)
        label = f"{str(dtype).removeprefix('torch.')} {kind}, batch {batch}"
        merged, unmerged, theirs = (ratio(found[s], found["base"]) for s in ("merged", "unmerged", "PEFT"))
        rows += [
            Row(f"{label}: merged ÷ base", merged, at_most=1.02),
            Row(f"{label}: one unmerged adapter ÷ base", unmerged, at_most=1.15, beside={"PEFT": theirs}),
        ]
    return rows


def measure(quick: bool) -> Report:
    import torch

    torch.set_num_threads(THREADS)
    rounds = 3 if quick else 7
    with torch.no_grad():
        rows = [
            row
            for dtype in (torch.float32, torch.bfloat16)
            for batch in (1, 8)
            for row in of_dtype(dtype, batch, rounds)
        ]
    conditions = {
        "model": "Llama-shaped, hidden 576, 30 layers, r = 16 on all 210 linears, float32 factors",
        "decode": f"one token for each row, a cache of {LENGTH} positions",
        "prefill": f"{LENGTH} tokens a row",
    }
    return Report(question(__doc__), rows, conditions)
