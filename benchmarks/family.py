"""What does one pass over eight adapters of a family cost, beside training them one after another?

Eight adapters of ranks 4 to 64 take a step each: forward, backward and AdamW. A family does it in one pass;
Veneer and PEFT take turns with one model that holds all eight. The last comparisons are with one adapter and
the same tokens. One of the mean rank has as many multiplications. What one pass takes more has three causes,
two of which are given as shares of the one adapter's step: the products of the factors, which are thin and
many (taken adapter by adapter; in 16 bits a family batches some, which saves calls and costs padding); AdamW
and clipping, which go through the numbers of all eight; and calls. An adapter of the rank of all eight
together has as many numbers to update, and more to multiply.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._models import LINEARS, adapted, library, llama
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

RANKS = (4, 8, 8, 16, 16, 32, 32, 64)
MEAN = sum(RANKS) // len(RANKS)
HIDDEN, LAYERS, VOCABULARY = 576, 4, 1024
#: (texts, tokens) of each adapter: bars for one pass ÷ Veneer's turns in bf16, and ÷ PEFT's.
SHAPES: dict[tuple[int, int], tuple[float, float]] = {
    (1, 64): (1 / 2.3, 1 / 3.0),
    (1, 128): (1 / 1.5, 1 / 2.5),
    (4, 256): (1.0, 1.0),
}
#: Of one pass ÷ one adapter with the same tokens.
APART = 1.05
#: (in, out) of the linears of a layer.
LINEAR_SIZES = (*2 * [(576, 576)], *2 * [(576, 192)], *2 * [(576, 1536)], (1536, 576))

Batch = dict[str, Tensor]


def family(base: Any, ranks: dict[str, int]) -> Any:
    """A base with adapters of these ranks on every linear."""
    from veneer import Family, LoraConfig

    made = Family(base)
    for seed, (name, r) in enumerate(ranks.items()):
        config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=LINEARS, init_lora_weights=False)
        made.add(name, config, seed=seed)
    return made


def peak(ranks: list[int]) -> int:
    """Bytes at the peak of a process that takes two steps of adapters, on a base of SmolLM2-135M's shape."""
    torch.set_num_threads(THREADS)
    base = llama(HIDDEN, 30, torch.bfloat16, head=True, vocabulary=49152)
    made = family(base, {str(number): r for number, r in enumerate(ranks)})
    ids = torch.randint(0, VOCABULARY, (1, 64))
    for _ in range(2):
        made.forward_backward(
            {name: {"input_ids": ids, "labels": ids} for name in map(str, range(len(ranks)))}
        )
        made.optim_step()
    return memory("VmHWM")


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


def in_one_pass(made: Any, batches: dict[str, Batch], updates: list[float]) -> Callable[[], float]:
    """A step of these adapters; what its optimizers took is added to `updates`."""

    def measured() -> float:
        start = time.perf_counter()
        made.forward_backward(batches)
        computed = time.perf_counter()
        made.optim_step()
        end = time.perf_counter()
        updates.append(end - computed)
        return end - start

    return measured


def products(ranks: tuple[int, ...], tokens: int, dtype: torch.dtype) -> Callable[[], float]:
    """The six products of the factors in each linear of the model, each adapter's with its own tokens."""
    given = [
        [torch.randn(*size).to(dtype) for size in ((tokens, i), (tokens, o), (r, i), (r, o), (tokens, r))]
        for i, o in LINEAR_SIZES
        for r in ranks
    ]

    def measured() -> float:
        start = time.perf_counter()
        for _ in range(LAYERS):
            for x, y, A, B, h in given:
                x @ A.t(), y @ B.t(), h.t() @ x, h.t() @ y
                x.addmm_(h, A, alpha=1e-6)
                y.addmm_(h, B, alpha=1e-6)
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
    base = llama(HIDDEN, LAYERS, dtype, head=True, vocabulary=VOCABULARY)
    ranks = {str(number): r for number, r in enumerate(RANKS)}
    made = family(base, {**ranks, "mean": MEAN, "all": sum(RANKS)})
    held = {side: turns(side, dtype) for side in ("veneer", "PEFT")}
    rows = []
    for (texts, tokens), (bar, peer_bar) in SHAPES.items():
        ids = torch.randint(0, VOCABULARY, (len(RANKS) * texts, tokens))
        parts = ids.split(texts)
        batches = {str(i): {"input_ids": part, "labels": part} for i, part in enumerate(parts)}
        whole = {"input_ids": ids, "labels": ids}
        updates: dict[str, list[float]] = {"family": [], "one": []}
        tokens_each = texts * tokens
        sides = {
            "family": in_one_pass(made, batches, updates["family"]),
            "one": in_one_pass(made, {"mean": whole}, updates["one"]),
            "all": in_one_pass(made, {"all": whole}, []),
            "products": products(RANKS, tokens_each, dtype),
            "products of one": products((MEAN,), len(RANKS) * tokens_each, dtype),
            **{side: by_turns(*held[side], batches) for side in held},
        }
        found = take_turns(sides, rounds=rounds)
        one = statistics.median(found["one"])
        thin = [(a - b) / one for a, b in zip(found["products"], found["products of one"], strict=True)]
        update = [(a - b) / one for a, b in zip(updates["family"][1:], updates["one"][1:], strict=True)]
        kind = str(dtype).removeprefix("torch.")
        what = f"{kind}, {texts} × {tokens} tokens an adapter"
        bars = (bar, peer_bar) if dtype == torch.bfloat16 else (1.0, 1.0)
        rows += [
            Row(
                f"{what}: one pass ÷ Veneer's turns", ratio(found["family"], found["veneer"]), at_most=bars[0]
            ),
            Row("  ÷ PEFT's turns", ratio(found["family"], found["PEFT"]), at_most=bars[1]),
            Row(
                "  ÷ one adapter of the mean rank, the same tokens",
                ratio(found["family"], found["one"]),
                at_most=APART,
            ),
            Row("  more than that one's: products of factors", Figure.of(thin)),
            Row("  more than that one's: AdamW and clipping", Figure.of(update)),
            Row("  ÷ one of the rank of all eight", ratio(found["family"], found["all"]), at_most=APART),
        ]
    return rows


def measure(quick: bool) -> Report:
    torch.set_num_threads(THREADS)
    torch.manual_seed(1)
    rows = [row for dtype in (torch.float32, torch.bfloat16) for row in compare(dtype, 2 if quick else 5)]
    one, eight = (in_fresh_process(peak, ranks=ranks) for ranks in ([MEAN], RANKS))
    share = Figure.exact(eight / (len(RANKS) * one))
    rows.append(Row("bfloat16, 1 × 64: peak memory ÷ that of a process for each adapter", share, at_most=0.2))
    conditions = {
        "model": f"Llama-shaped, hidden {HIDDEN}, {LAYERS} layers",
        "adapters": f"eight, of ranks {', '.join(map(str, RANKS))}, on every linear",
        "mean rank": MEAN,
        "peak memory": "of the shape of SmolLM2-135M: 30 layers, 49,152 tokens; libraries included",
        "step": "forward, backward and AdamW; one pass also clips gradients and checks that they are finite",
    }
    return Report(question(__doc__), rows, conditions)


def draw(report: Report, path: Path) -> None:
    from benchmarks._pictures import bars

    groups = {
        row.label.partition(":")[0]: {"Veneer": row.ours, "PEFT": peer.ours}
        for row, peer in zip(report.rows[:-1:6], report.rows[1:-1:6], strict=True)
    }
    bars(path, groups, "One pass over eight adapters ÷ eight steps of each library", floor=1.0)
