"""On a CUDA device: what does a LoRA step cost beside the frozen one, in Triton, in plain torch and in PEFT?

The floor is the frozen layer's (model's) own forward and the gradient of its input. A step in Triton is kept
only if it is no slower than the same step in plain torch, which the last row of each case asks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks._models import adapted, library, llama
from benchmarks.harness import Report, Row, question, ratio, take_turns
from veneer.ops.gpu import SWITCH

DTYPE = torch.bfloat16
HIDDEN, LAYERS, TOKENS, RANK = 4096, 2, 4096, 16
#: What the design expects of one linear at dropout 0 on an H100.
LINEAR_AIM = 1.09


def measure(quick: bool) -> Report:
    if not torch.cuda.is_available():
        return Report(
            question(__doc__), [], {"not measured": "there is no CUDA device here; run it where there is one"}
        )
    rows = []
    for p in (0.0, 0.05):
        rows += compare(linears(HIDDEN, p), (TOKENS, HIDDEN), f"one linear, dropout {p}", quick, p)
        rows += compare(models(HIDDEN, LAYERS, p), (4, TOKENS // 4, HIDDEN), f"model, dropout {p}", quick, p)
    return Report(
        question(__doc__),
        rows,
        {
            "device": torch.cuda.get_device_name(),
            "CUDA, Triton": f"{torch.version.cuda}, {library('triton').__version__}",
            "shapes": f"{DTYPE}, {TOKENS} tokens, r {RANK}; linear {HIDDEN}x{HIDDEN}; "
            f"Llama-shaped, hidden {HIDDEN}, {LAYERS} layers, LoRA on every linear",
        },
    )


def linears(width: int, p: float) -> dict[str, Any]:
    """One linear by side: frozen, and with an adapter of each library."""

    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(width, width, bias=False)).to(DTYPE)

    wrapped = {side: adapted(side, base(), r=RANK, p=p, target_modules=["0"]) for side in ("veneer", "PEFT")}
    return {"floor": base().requires_grad_(False), **wrapped}


def models(width: int, layers: int, p: float) -> dict[str, Any]:
    """A Llama-shaped model by side; its input is hidden states, so that every layer passes gradients."""
    wrapped = {side: adapted(side, llama(width, layers, DTYPE), r=RANK, p=p) for side in ("veneer", "PEFT")}
    return {"floor": llama(width, layers, DTYPE).requires_grad_(False), **wrapped}


def compare(
    modules: dict[str, Any], shape: tuple[int, ...], label: str, quick: bool, p: float, device: str = "cuda"
) -> list[Row]:
    """Step ÷ floor of Triton, beside plain torch and PEFT; and Triton ÷ plain torch."""
    x = torch.randn(*shape, device=device, dtype=DTYPE).requires_grad_()
    steps = {side: step_of(module.to(device).train(), x) for side, module in modules.items()}
    sides = {
        "floor": measured(steps["floor"], device),
        "Triton": measured(steps["veneer"], device, switch="1"),
        "plain torch": measured(steps["veneer"], device, switch="0"),
        "PEFT": measured(steps["PEFT"], device),
    }
    if device == "cuda":
        require_triton(modules["veneer"], x)
    times = take_turns(sides, rounds=5 if quick else 20, warm_up=2)
    beside = {side: ratio(times[side], times["floor"]) for side in ("plain torch", "PEFT")}
    aim = LINEAR_AIM if p == 0.0 and len(shape) == 2 else None
    return [
        Row(f"{label}: step ÷ floor", ratio(times["Triton"], times["floor"]), aim=aim, beside=beside),
        Row(f"{label}: Triton ÷ plain torch", ratio(times["Triton"], times["plain torch"]), at_most=1.0),
    ]


def step_of(module: Any, x: Tensor) -> Callable[[], None]:
    """Forward and backward, with gradients for the input and for what trains."""

    def step() -> None:
        out = output_of(module, x)
        out.backward(out.detach())
        x.grad = None
        module.zero_grad(set_to_none=True)

    return step


def output_of(module: Any, x: Tensor) -> Tensor:
    """Of a layer, whose x has two dimensions, or of a model that takes hidden states."""
    out: Tensor = module(x) if x.dim() == 2 else module(inputs_embeds=x).last_hidden_state
    return out


def measured(step: Callable[[], None], device: str, *, switch: str = "1") -> Callable[[], float]:
    """Seconds of ten steps in a row, the device waited for."""

    def run() -> float:
        with mock.patch.dict(os.environ, {SWITCH: switch}):
            wait(device)
            start = time.perf_counter()
            for _ in range(10):
                step()
            wait(device)
            return time.perf_counter() - start

    return run


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def require_triton(module: Any, x: Tensor) -> None:
    """A side called Triton must not fall back to plain torch unseen.

    Raises:
        RuntimeError: It did.
    """
    taken: set[str] = set()
    hooks = [
        layer.register_forward_hook(lambda _, __, y: taken.add(type(y.grad_fn).__name__))
        for layer in module.modules()
        if hasattr(layer, "lora_A")
    ]
    with mock.patch.dict(os.environ, {SWITCH: "1"}):
        output_of(module, x)
    for hook in hooks:
        hook.remove()
    if taken != {"TritonLoraBackward"}:
        raise RuntimeError(f"the Triton path was not taken, but {sorted(taken)}; `python -W always` says why")
