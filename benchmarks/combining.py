"""What does the SVD combination of two adapters cost beside the reference, and is it exact?"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks._models import LINEARS, adapted, library, llama
from benchmarks.harness import THREADS, Figure, Report, Row, question, ratio, take_turns

HIDDEN, LAYERS, RANK = 576, 30, 16
SIDES = ("veneer", "PEFT")


def two_adapters(side: str) -> Any:
    """A model with the adapters "default" and "other"."""
    model = adapted(side, llama(HIDDEN, LAYERS, torch.float32), r=RANK)
    config = library(side).LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=LINEARS, init_lora_weights=False
    )
    torch.manual_seed(1)
    model.add_adapter("other", config)
    return model


def combine(model: Any, rank: int) -> None:
    model.add_weighted_adapter(
        ["default", "other"], [0.7, -0.3], "combined", combination_type="svd", svd_rank=rank
    )


def update(model: Any, name: str, index: int) -> torch.Tensor:
    """``s·B A`` of an adapter, in float64; the same formula for both libraries."""
    layer = [m for m in model.modules() if hasattr(m, "lora_A") and name in m.lora_A][index]
    a, b = layer.lora_A[name].weight.detach().double(), layer.lora_B[name].weight.detach().double()
    return layer.scaling[name] * b @ a


def error(model: Any, rank: int) -> float:
    """The largest relative distance from the best approximation of that rank, by a dense SVD in float64."""
    worst = 0.0
    for index in range(7):  # one layer of each shape and kind
        whole = 0.7 * update(model, "default", index) - 0.3 * update(model, "other", index)
        u, s, vh = torch.linalg.svd(whole, full_matrices=False)
        best = u[:, :rank] * s[:rank] @ vh[:rank]
        worst = max(worst, float((update(model, "combined", index) - best).norm() / best.norm()))
    return worst


def measure(quick: bool) -> Report:
    torch.set_num_threads(THREADS)
    models = {side: two_adapters(side) for side in SIDES}

    def one(side: str) -> float:
        model = models[side]
        if "combined" in model.peft_config:
            model.delete_adapter("combined")
        start = time.perf_counter()
        combine(model, RANK)
        return time.perf_counter() - start

    # One turn of the reference takes more than ten seconds.
    times = take_turns({side: (lambda side=side: one(side)) for side in SIDES}, rounds=2)
    errors = {side: error(models[side], RANK) for side in SIDES}
    return Report(
        question(__doc__),
        [
            Row("svd of two adapters ÷ PEFT", ratio(times["veneer"], times["PEFT"]), at_most=0.25 / 10.7),
            Row(
                "svd of two adapters",
                Figure.of([1e3 * t for t in times["veneer"]]),
                "ms",
                beside={"PEFT": Figure.of([1e3 * t for t in times["PEFT"]])},
            ),
            Row(
                "relative distance from the best approximation",
                Figure.exact(errors["veneer"]),
                at_most=1e-5,
                beside={"PEFT": Figure.exact(errors["PEFT"])},
            ),
        ],
        {
            "model": f"Llama-shaped, {LAYERS} layers, hidden {HIDDEN}, {7 * LAYERS} linears, fp32",
            "adapters": f"two of r={RANK} on all linears, weights 0.7 and -0.3, result of rank {RANK}",
        },
    )
