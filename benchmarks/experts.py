"""What do the experts of a mixture with an adapter cost beside PEFT's, in time, operations and bytes?

PEFT adds ``s·BA`` of every expert to a copy of the stack at each call. Veneer multiplies the tokens of an
expert with its factors: it computes for the chosen experts only, and keeps nothing as large as the stack.
Both take turns in one process with the frozen model. Operations are those that torch counts in matrix
products; bytes kept are distinct storages for the backward, less the model's own tensors.

The last rows are of four adapters in one batch, beside four calls of the same model and beside one adapter
with all tokens. An expert multiplies the tokens of one adapter at a time, so such a batch saves little where
experts are most of the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._models import adapted
from benchmarks.harness import THREADS, Figure, Report, Row, question, ratio, take_turns
from benchmarks.saved_for_backward import kept_bytes

HIDDEN, INNER, LAYERS, EXPERTS, CHOSEN, RANK = 256, 512, 1, 8, 2, 8
STACKS = ["gate_up_proj", "down_proj"]
WAYS = ("eager", "grouped_mm")
#: (texts, tokens) of a forward without gradients, and of a training step.
FORWARDS, STEPS = ((1, 1), (1, 256)), ((1, 64), (4, 256))
#: An expert's factors have r(in + out) numbers where its matrices have in·out. A step takes three products
#: with each factor, beside two with each frozen matrix.
FACTORS = sum(
    RANK * (size_in + size_out) / (size_in * size_out)
    for size_in, size_out in ((HIDDEN, 2 * INNER), (INNER, HIDDEN))
)
OWNERS = ["a", "b", "c", "d"]
#: Of four adapters in one batch ÷ four calls: what following the tokens may cost.
FOLLOWED = 1.05


def mixture() -> Any:
    """A Mixtral-shaped model with random weights, the same at every call; it gives hidden states."""
    from transformers import MixtralConfig, MixtralModel

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        use_cache=False,
    )
    return MixtralModel(config)


def with_adapter(side: str, name: str = "default") -> Any:
    model = mixture().requires_grad_(False)
    if side == "base":
        return model
    return adapted(side, model, r=RANK, adapter_name=name, target_modules=[], target_parameters=STACKS)


def forward(model: Any, x: torch.Tensor, **options: Any) -> Callable[[], float]:
    def measured() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            model(inputs_embeds=x, **options)
        return time.perf_counter() - start

    return measured


def step(model: Any, x: torch.Tensor, **options: Any) -> Callable[[], float]:
    """Forward and backward; inputs need gradients, so that every layer passes gradients on."""
    gradient = torch.randn_like(x)

    def measured() -> float:
        inputs = x.clone().requires_grad_(True)
        start = time.perf_counter()
        model(inputs_embeds=inputs, **options).last_hidden_state.backward(gradient)
        seconds = time.perf_counter() - start
        model.zero_grad(set_to_none=True)
        return seconds

    return measured


def operations(call: Callable[[], float]) -> int:
    with FlopCounterMode(display=False) as counted:
        call()
    return counted.get_total_flops()


def beside(sides: dict[str, Any], way: str, rounds: int) -> list[Row]:
    """Times of both libraries as multiples of the frozen model's."""
    rows = []
    for model in sides.values():
        model.config._experts_implementation = way
    for what, shapes, run in (("forward", FORWARDS, forward), ("step", STEPS, step)):
        for texts, tokens in shapes:
            x = torch.randn(texts, tokens, HIDDEN)
            found = take_turns(
                {side: run(model, x) for side, model in sides.items()}, rounds=rounds, warm_up=1
            )
            others = {"PEFT": ratio(found["PEFT"], found["base"])}
            label = f"{what}, {way}, {texts} × {tokens} tokens"
            rows.append(Row(f"{label}: ÷ frozen", ratio(found["veneer"], found["base"]), beside=others))
            rows.append(Row("  ÷ PEFT", ratio(found["veneer"], found["PEFT"]), at_most=1.0))
    return rows


def counted(sides: dict[str, Any]) -> list[Row]:
    """Operations as multiples of the frozen model's, and bytes kept beyond its own."""
    for model in sides.values():
        model.config._experts_implementation = "eager"
    rows = []
    for what, (texts, tokens), run, bar in (
        ("forward", FORWARDS[0], forward, 1 + FACTORS / 2),
        ("step", STEPS[-1], step, 1 + 3 * FACTORS / 4),
    ):
        x = torch.randn(texts, tokens, HIDDEN)
        number = {side: operations(run(model, x)) for side, model in sides.items()}
        ours, peer = (Figure.exact(number[side] / number["base"]) for side in ("veneer", "PEFT"))
        label = f"operations of a {what}, {texts} × {tokens} tokens, ÷ frozen"
        rows.append(Row(label, ours, at_most=bar, beside={"PEFT": peer}))
    x = torch.randn(*STEPS[-1], HIDDEN)
    kept = {side: kept_bytes(model, x) for side, model in sides.items()}
    ours, peer = (Figure.exact((kept[side] - kept["base"]) / 1e6) for side in ("veneer", "PEFT"))
    label = f"kept for the backward beyond the frozen model, {STEPS[-1][0]} × {STEPS[-1][1]} tokens"
    return [*rows, Row(label, ours, "MB", at_most=peer.median, beside={"PEFT": peer})]


def mixed(rounds: int) -> list[Row]:
    """Four adapters in one batch."""
    from veneer import LoraConfig

    model = with_adapter("veneer", OWNERS[0])
    config = LoraConfig(r=RANK, target_modules=[], target_parameters=STACKS, init_lora_weights=False)
    for name in OWNERS[1:]:
        model.add_adapter(name, config)
    for parameter in model.base_model.index.parameters(OWNERS[0]):
        parameter.requires_grad_(True)
    model.config._experts_implementation = "eager"
    rows = []
    for what, tokens, run in (("forward", 1, forward), ("forward", 64, forward), ("step", 64, step)):
        x = torch.randn(len(OWNERS), tokens, HIDDEN)
        parts = [run(model, x[i : i + 1], adapter_names=[name]) for i, name in enumerate(OWNERS)]
        sides = {
            "mixed": run(model, x, adapter_names=OWNERS),
            "turns": lambda parts=parts: sum(part() for part in parts),
            "one": run(model, x, adapter_names=OWNERS[:1] * len(OWNERS)),
        }
        found = take_turns(sides, rounds=rounds, warm_up=1)
        label = f"{what} of four adapters, {tokens} tokens each"
        rows.append(Row(f"{label}: ÷ in turns", ratio(found["mixed"], found["turns"]), at_most=FOLLOWED))
        rows.append(Row("  ÷ one adapter, the same tokens", ratio(found["mixed"], found["one"])))
    return rows


def measure(quick: bool) -> Report:
    torch.set_num_threads(THREADS)
    torch.manual_seed(1)
    rounds = 3 if quick else 9
    sides = {side: with_adapter(side) for side in ("veneer", "PEFT", "base")}
    rows = [row for way in WAYS for row in beside(sides, way, rounds)]
    rows += [*counted(sides), *mixed(rounds)]
    conditions = {
        "model": f"Mixtral-shaped, float32, hidden {HIDDEN}, experts' hidden {INNER}, {LAYERS} layers, "
        f"{EXPERTS} experts, {CHOSEN} for each token",
        "adapter": f"r={RANK} on both stacks of every layer",
    }
    return Report(question(__doc__), rows, conditions)


def draw(report: Report, path: Path) -> None:
    from benchmarks._pictures import bars

    groups = {
        row.label.partition(":")[0]: {"Veneer": row.ours, **row.beside}
        for row in report.rows
        if row.beside and not row.unit
    }
    bars(path, groups, "Experts with an adapter, as a multiple of the frozen model's own", floor=1.0)
