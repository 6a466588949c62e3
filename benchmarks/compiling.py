"""How often does `torch.compile` compile again when adapters, strengths, rows or weights change?

Counts, not times: graph breaks, and graphs compiled after each state was seen once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks._models import adapted, library, llama
from benchmarks.harness import Figure, Report, Row, question

VOCABULARY = 64
#: Ten batches of four rows.
COMPOSITIONS = [list(names) for names in itertools.product("ab", repeat=4)][1:11]


class Counter:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: list[Any]) -> Any:
        self.graphs += 1
        return graph.forward


@contextmanager
def counted(side: str) -> Iterator[tuple[Any, Counter, dict[str, int]]]:
    """A compiled model with two adapters, its count of graphs, and of graph breaks by their reason."""
    import torch
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = adapted(
        side, llama(576, 2, torch.float32, head=True, vocabulary=VOCABULARY), adapter_name="a",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model.add_adapter("b", model.peft_config["a"])
    counter = Counter()
    model.eval().compile(backend=counter)
    before = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = 64  # else the reference's last changes would run uncompiled
    try:
        yield model, counter, counters["graph_break"]
    finally:
        torch._dynamo.config.recompile_limit = before
        torch._dynamo.reset()


def switching(model: Any, run: Callable[..., Any]) -> Iterator[None]:
    """Adapters back and forth; both were seen before the second yield."""
    for name in "ab":
        model.set_adapter(name)
        run()
    yield
    for name in "abab":
        model.set_adapter(name)
        run()


def scaling(model: Any, run: Callable[..., Any]) -> Iterator[None]:
    """Other strengths of all layers, then of one."""
    layers = [m for m in model.modules() if hasattr(m, "scaling") and hasattr(m, "scale_layer")]
    run()
    yield
    for layer in layers:
        layer.scale_layer(0.5)
    run()
    for layer in layers[:3]:
        layer.scaling["a"] = 0.1
        run()


def mixing(model: Any, run: Callable[..., Any]) -> Iterator[None]:
    """Other compositions of a mixed batch of one size."""
    run(adapter_names=COMPOSITIONS[0])
    yield
    for names in COMPOSITIONS[1:]:
        run(adapter_names=names)


def swapping(model: Any, run: Callable[..., Any]) -> Iterator[None]:
    """Other values in the factors."""
    run()
    yield
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(0.5)
    run()


CHANGES: dict[str, Callable[..., Iterator[None]]] = {
    "set_adapter a, b, a, b": switching,
    "another scale, of all layers and of single ones": scaling,
    "ten compositions of a mixed batch": mixing,
    "other weights of the same shape": swapping,
}


def count(side: str, change: Callable[..., Iterator[None]]) -> tuple[int, int]:
    """(graph breaks, graphs compiled by the changes)."""
    import torch

    ids = torch.randint(0, VOCABULARY, (4, 8))
    with counted(side) as (model, counter, breaks), torch.no_grad():
        steps = change(model, lambda **more: model(input_ids=ids, use_cache=False, **more))
        next(steps)
        seen = counter.graphs
        for _ in steps:
            pass
        return sum(breaks.values()), counter.graphs - seen


def measure(quick: bool) -> Report:
    rows = []
    for label, change in CHANGES.items():
        ours, theirs = count("veneer", change), count("PEFT", change)
        for what, mine, its in zip(("graph breaks", "graphs compiled anew"), ours, theirs, strict=True):
            row = Row(
                f"{label}: {what}", Figure.exact(mine), "", at_most=0, beside={"PEFT": Figure.exact(its)}
            )
            rows.append(row)
    conditions = {
        "compiled with": "model.compile()",
        "model": "Llama-shaped, 2 layers",
        "libraries": [library(side).__name__ for side in ("veneer", "PEFT")],
    }
    return Report(question(__doc__), rows, conditions)
