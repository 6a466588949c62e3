"""The door to the kernels: which tensors it lets in, and what it says where it cannot open."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.processes import run_python
from tests.unit.ops.cases import NAMES, SCALING, tensors
from veneer.errors import VeneerWarning
from veneer.ops import gpu, triton_lora
from veneer.ops.lora_linear import lora_linear


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Questions about the device are answered as an H100 would; kernels are taken to agree."""
    monkeypatch.setenv(gpu.SWITCH, "1")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(triton_lora, "disagreement", lambda device, dtype: None)
    gpu._checked_step.cache_clear()
    gpu._multiprocessors.cache_clear()
    yield monkeypatch
    gpu._checked_step.cache_clear()
    gpu._multiprocessors.cache_clear()


def given(**options: Any) -> dict[str, torch.Tensor | None]:
    return tensors((4, 1024, 576), **{"out": 576, "dtype": torch.bfloat16, **options})


def step_for(tensors: dict[str, torch.Tensor | None]) -> type[torch.autograd.Function] | None:
    return gpu.triton_step(*(tensors[name] for name in NAMES))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": torch.float16}, {"bias": False, "B_bias": False}, {"factor_dtype": torch.float32}],
)
def test_what_suits_is_let_in(on_cuda: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    assert step_for(given(**options)) is triton_lora.TritonLora


@pytest.mark.parametrize(
    "changed",
    [
        {"x": torch.randn(4, 1024, 576)},
        {"x": torch.randn(4, 1024, 575, dtype=torch.bfloat16)},
        {"x": torch.randn(4, 500, 576, dtype=torch.bfloat16)},
        {"x": torch.randn(0, 576, dtype=torch.bfloat16)},
        {"x": torch.tensor(1.0, dtype=torch.bfloat16)},
        {"weight": torch.randn(576, 576)},
        {"weight": torch.randn(300, 576, dtype=torch.bfloat16)},
        {"bias": torch.randn(576)},
        {"bias": torch.randn(1, dtype=torch.bfloat16)},
        {"A": torch.randn(4, 575)},
        {"A": torch.randn(4, 576, device="meta")},
        {"B": torch.randn(576, 5)},
        {"A": torch.randn(257, 576), "B": torch.randn(576, 257)},
        {"B_bias": torch.randn(575)},
    ],
)
def test_what_does_not_suit_is_left_to_torch(
    on_cuda: pytest.MonkeyPatch, changed: dict[str, torch.Tensor]
) -> None:
    assert step_for({**given(), **changed}) is None


@pytest.mark.parametrize("value", [None, "", "0"])
def test_it_stays_shut_unless_asked_for(on_cuda: pytest.MonkeyPatch, value: str | None) -> None:
    if value is None:
        on_cuda.delenv(gpu.SWITCH)
    else:
        on_cuda.setenv(gpu.SWITCH, value)
    assert step_for(given()) is None


@pytest.mark.parametrize(
    ("place", "name", "answer"),
    [
        (torch.version, "cuda", None),
        (torch.cuda, "get_device_capability", lambda device: (7, 5)),
        (gpu, "find_spec", lambda name: None),
    ],
)
def test_other_devices_and_no_triton_are_left_to_torch(
    on_cuda: pytest.MonkeyPatch, place: Any, name: str, answer: Any
) -> None:
    on_cuda.setattr(place, name, answer)
    assert step_for(given()) is None


def no_compiler(device: torch.device, dtype: torch.dtype) -> str:
    raise RuntimeError("Failed to find C compiler")


@pytest.mark.parametrize(
    ("check", "words"),
    [
        (lambda device, dtype: "the output is off by 3.0e-01", "the output is off"),
        (no_compiler, "RuntimeError: Failed to find C compiler"),
    ],
)
def test_what_cannot_be_trusted_is_said_once(on_cuda: pytest.MonkeyPatch, check: Any, words: str) -> None:
    on_cuda.setattr(triton_lora, "disagreement", check)
    with pytest.warns(VeneerWarning, match=words):
        assert step_for(given()) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert step_for(given()) is None


def test_work_on_a_cpu_never_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.ops.lora_linear.triton_step", lambda *given: pytest.fail("asked on a CPU"))
    lora_linear(*(given()[name] for name in NAMES), SCALING, 0.05).sum().backward()  # type: ignore[arg-type]


def test_work_on_a_cpu_never_imports_triton() -> None:
    run_python(
        "import sys, torch, veneer\n"
        "model = veneer.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)),\n"
        "                              veneer.LoraConfig(target_modules=['0'], lora_dropout=0.1))\n"
        "before = set(sys.modules)\n"
        "model(torch.randn(3, 8)).sum().backward()\n"
        "assert not {name for name in sys.modules if name.startswith('veneer.ops.triton')}\n"
        "assert 'triton' not in set(sys.modules) - before\n"
    )
