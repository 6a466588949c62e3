"""How much does a training step keep for its backward, and what is its peak, beside PEFT?

Kept bytes are counted with `saved_tensors_hooks`: distinct storages, less those of parameters, buffers and
what the frozen base keeps itself, over tokens and adapted modules. That does not vary from run to run. The
peak is what torch's allocator held at most during a second step, above what was there right after wrapping,
in a fresh process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks._models import LINEARS, adapted, llama
from benchmarks.harness import THREADS, Figure, Report, Row, in_fresh_process, question
from benchmarks.plan_memory import MARK, allocated

HIDDEN, LAYERS, BATCH, LENGTH = 576, 30, 4, 256
#: dtype and dropout: bytes per token and module at most; None: PEFT's own.
BARS: dict[tuple[str, float], float | None] = {
    ("bfloat16", 0.0): 1000,
    ("bfloat16", 0.05): 1200,
    ("float32", 0.0): None,
    ("float32", 0.05): 2100,
}


def kept_bytes(model: Any, x: torch.Tensor) -> int:
    """Bytes of the distinct storages that a forward keeps, less the model's own."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}
    held = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # as long as it is here, no other tensor gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(inputs_embeds=x.clone().requires_grad_(True)).last_hidden_state
    del output
    return sum(found.values())


def beyond_the_base(side: str, kind: str, p: float) -> float:
    """Bytes per token and adapted module that an adapter adds to what the frozen base keeps."""
    dtype = getattr(torch, kind)
    layers = 4  # every layer keeps the same
    torch.manual_seed(1)
    x = torch.randn(BATCH, LENGTH, HIDDEN).to(dtype)
    frozen = kept_bytes(llama(HIDDEN, layers, dtype).train().requires_grad_(False), x)
    model = adapted(side, llama(HIDDEN, layers, dtype), p=p).train()
    return (kept_bytes(model, x) - frozen) / (BATCH * LENGTH * layers * len(LINEARS))


def peak(side: str, kind: str, p: float) -> int:
    """Bytes of the peak of a training step above what was held right after wrapping."""
    from torch.profiler import ProfilerActivity, profile

    torch.set_num_threads(THREADS)
    dtype = getattr(torch, kind)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        model = adapted(side, llama(HIDDEN, LAYERS, dtype), p=p).train()
        x = torch.randn(BATCH, LENGTH, HIDDEN).to(dtype)
        torch.empty(MARK, dtype=torch.uint8)
        for _ in range(2):
            output = model(inputs_embeds=x.clone().requires_grad_(True)).last_hidden_state
            output.float().square().mean().backward()
            del output
            model.zero_grad(set_to_none=True)
    most, standing = allocated(profiled, MARK)
    return most - standing


def measure(quick: bool) -> Report:
    torch.set_num_threads(THREADS)
    rows = []
    for (kind, p), bar in BARS.items():
        ours, peer = (beyond_the_base(side, kind, p) for side in ("veneer", "PEFT"))
        rows.append(
            Row(
                f"kept for backward, {kind}, dropout {p}",
                Figure.exact(ours),
                "bytes/token/module",
                at_most=peer if bar is None else bar,
                beside={"PEFT": Figure.exact(peer)},
            )
        )
    for kind, p in [("bfloat16", 0.05)] if quick else [("bfloat16", 0.05), ("float32", 0.05)]:
        ours, peer = (in_fresh_process(peak, side=s, kind=kind, p=p) for s in ("veneer", "PEFT"))
        rows.append(
            Row(
                f"peak of a step, {kind}, dropout {p}, ÷ PEFT's",
                Figure.exact(ours / peer),
                at_most=0.5 if (kind, p) == ("bfloat16", 0.05) else None,
                beside={"PEFT, MB": Figure.exact(peer / 1e6), "Veneer, MB": Figure.exact(ours / 1e6)},
            )
        )
    conditions = {"model": f"hidden {HIDDEN}, {LAYERS} layers, r=16 on every linear, {BATCH * LENGTH} tokens"}
    return Report(question(__doc__), rows, conditions)


def draw(report: Report, path: Path) -> None:
    from benchmarks._pictures import bars

    groups = {
        row.label.removeprefix("kept for backward, "): {"Veneer": row.ours, **row.beside}
        for row in report.rows
        if row.unit
    }
    bars(path, groups, "Kept for the backward beyond the frozen base, bytes per token and module")
