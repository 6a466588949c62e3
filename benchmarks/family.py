"""What does one pass over eight adapters of a family cost, beside training them one after another?

Eight adapters of ranks 4 to 64 take a step each: forward, backward and AdamW. A family does it in one pass;
Veneer and PEFT take turns with one model that holds all eight. The last comparisons are with one adapter and
the same tokens: of rank 16, which has an eleventh of the numbers to update, and of the rank of all eight
together. What is above the latter is the price of keeping the adapters apart. The former needs many tokens:
an adapter's layer takes ``3 r (in + out)`` multiplications for each of its tokens, and AdamW and clipping go
through its ``r (in + out)`` numbers once a step, however few tokens there are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._models import LINEARS, adapted, library, llama
from benchmarks.harness import THREADS, Report, Row, question, ratio, take_turns

RANKS = (4, 8, 8, 16, 16, 32, 32, 64)
HIDDEN, LAYERS, VOCABULARY = 576, 8, 1024
#: (texts, tokens) of each adapter: bars for one pass ÷ Veneer's turns in bf16, and ÷ PEFT's.
SHAPES: dict[tuple[int, int], tuple[float, float]] = {
    (1, 64): (1 / 2.3, 1 / 3.0),
    (1, 128): (1 / 1.5, 1 / 2.5),
    (4, 256): (1.0, 1.0),
}
#: Of one pass ÷ one adapter with the same tokens.
APART = 1.05

Batch = dict[str, Tensor]


def family(dtype: torch.dtype) -> Any:
    """The base with eight adapters, and one of the rank of all together, each with an optimizer."""
    from veneer import Family, LoraConfig

    def config(r: int) -> LoraConfig:
        return LoraConfig(r=r, lora_alpha=2 * r, target_modules=LINEARS, init_lora_weights=False)

    made = Family(llama(HIDDEN, LAYERS, dtype, head=True, vocabulary=VOCABULARY))
    for number, r in enumerate(RANKS):
        made.add(str(number), config(r), seed=number)
    made.add("all", config(sum(RANKS)))
    return made


def turns(side: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """One model with eight adapters of a library, and an optimizer for each."""
    plain = llama(HIDDEN, LAYERS, dtype, head=True, vocabulary=VOCABULARY)
    model = adapted(side, plain, r=RANKS[0], adapter_name="0", task_type="CAUSAL_LM")
    for number, r in enumerate(RANKS[1:], 1):
        config = library(side).LoraConfig(
            r=r, lora_alpha=2 * r, target_modules=LINEARS, init_lora_weights=False, task_type="CAUSAL_LM"
        )
        model.add_adapter(str(number), config)
    optimizers = {}
    for number in range(len(RANKS)):
        model.set_adapter(str(number))
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizers[str(number)] = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    return model.train(), optimizers


def in_one_pass(made: Any, batches: dict[str, Batch]) -> Callable[[], float]:
    def measured() -> float:
        start = time.perf_counter()
        made.forward_backward(batches)
        made.optim_step()
        return time.perf_counter() - start

    return measured


def by_turns(model: Any, optimizers: dict[str, Any], batches: dict[str, Batch]) -> Callable[[], float]:
    def measured() -> float:
        start = time.perf_counter()
        for name, batch in batches.items():
            model.set_adapter(name)
            model(**batch, use_cache=False).loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
        return time.perf_counter() - start

    return measured


def compare(dtype: torch.dtype, rounds: int) -> list[Row]:
    """One pass beside turns, for each shape of a batch."""
    made = family(dtype)
    held = {side: turns(side, dtype) for side in ("veneer", "PEFT")}
    rows = []
    for (texts, tokens), (bar, peer_bar) in SHAPES.items():
        ids = torch.randint(0, VOCABULARY, (len(RANKS) * texts, tokens))
        parts = ids.split(texts)
        batches = {str(i): {"input_ids": part, "labels": part} for i, part in enumerate(parts)}
        middle = str(RANKS.index(16))
        sides = {
            "family": in_one_pass(made, batches),
            "one": in_one_pass(made, {middle: {"input_ids": ids, "labels": ids}}),
            "all": in_one_pass(made, {"all": {"input_ids": ids, "labels": ids}}),
            **{side: by_turns(*held[side], batches) for side in held},
        }
        found = take_turns(sides, rounds=rounds)
        kind = str(dtype).removeprefix("torch.")
        what = f"{kind}, {texts} × {tokens} tokens an adapter"
        bars = (bar, peer_bar) if dtype == torch.bfloat16 else (1.0, 1.0)
        rows += [
            Row(
                f"{what}: one pass ÷ Veneer's turns", ratio(found["family"], found["veneer"]), at_most=bars[0]
            ),
            Row("  ÷ PEFT's turns", ratio(found["family"], found["PEFT"]), at_most=bars[1]),
            Row("  ÷ one adapter, the same tokens", ratio(found["family"], found["one"]), at_most=APART),
            Row("  ÷ one of the rank of all eight", ratio(found["family"], found["all"]), at_most=APART),
        ]
    return rows


def measure(quick: bool) -> Report:
    torch.set_num_threads(THREADS)
    torch.manual_seed(1)
    rows = [row for dtype in (torch.float32, torch.bfloat16) for row in compare(dtype, 2 if quick else 5)]
    conditions = {
        "model": f"Llama-shaped, hidden {HIDDEN}, {LAYERS} layers",
        "adapters": f"eight, of ranks {', '.join(map(str, RANKS))}, on every linear",
        "step": "forward, backward and AdamW; one pass also clips gradients and checks that they are finite",
    }
    return Report(question(__doc__), rows, conditions)


def draw(report: Report, path: Path) -> None:
    from benchmarks._pictures import bars

    groups = {
        row.label.partition(":")[0]: {"÷ Veneer's turns": row.ours, "÷ PEFT's turns": peer.ours}
        for row, peer in zip(report.rows[::4], report.rows[1::4], strict=True)
    }
    bars(path, groups, "One pass over eight adapters, as a share of eight steps", floor=1.0)
