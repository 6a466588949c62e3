"""What a training step of a linear layer does, counted: a regression fails here without any timing."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from veneer import LoraConfig
from veneer.layers.making import wrap
from veneer.routing import routed

TOKENS, SIZE_IN, SIZE_OUT, RANK = 512, 64, 96, 8
#: Operations that only look at a tensor in another way.
FREE = {"detach", "view", "t", "transpose", "_unsafe_view", "alias", "expand", "as_strided"}


class Count(TorchDispatchMode):
    """Counts operations that compute or copy."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name not in FREE:
            self.calls[name] += 1
        return result


def counted(dtype: torch.dtype, p: float, *, scale: int = 2) -> tuple[Counter[str], Counter[str]]:
    """Operations of the forward and of the backward of one adapted linear whose input needs a gradient."""
    torch.manual_seed(0)
    base = nn.Linear(SIZE_IN, SIZE_OUT, bias=False).to(dtype)
    config = LoraConfig(r=RANK, lora_alpha=scale * RANK, lora_dropout=p, init_lora_weights=False)
    layer = wrap(base, config).train()
    x = torch.randn(4, TOKENS // 4, SIZE_IN).to(dtype).requires_grad_(True)
    gradient = torch.ones(4, TOKENS // 4, SIZE_OUT, dtype=dtype)
    with Count() as forward:
        y = layer(x)
    with Count() as backward:
        y.backward(gradient)
    assert isinstance(y, Tensor)
    return forward.calls, backward.calls


#: Products of the frozen layer (1 + 1) and of the branch (2 + 4): nothing less computes it.
PRODUCTS = {"forward": {"mm": 2, "addmm_": 1}, "backward": {"mm": 4, "addmm_": 1}}


@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_does_its_products_once_and_little_else(dtype: torch.dtype, p: float) -> None:
    for side, calls in zip(PRODUCTS, counted(dtype, p), strict=True):
        wanted = PRODUCTS[side]
        assert {name: calls[name] for name in wanted} == wanted
        assert not {"matmul", "bmm", "native_dropout", "bernoulli_", "where"} & set(calls)


def test_without_dropout_nothing_is_done_but_products_and_the_scale() -> None:
    forward, backward = counted(torch.float32, 0.0)
    assert forward.total() == 3
    # s on dA and dB, which are thin, and dB laid out as B is.
    assert set(backward) == {"mm", "addmm_", "mul_", "clone"}
    assert backward["mul_"] == 2 and backward["clone"] == 1
    assert counted(torch.float32, 0.0, scale=1)[1]["mul_"] == 0


def test_beside_a_16_bit_base_only_factors_are_cast() -> None:
    forward, backward = counted(torch.bfloat16, 0.0)
    assert forward["_to_copy"] == 2  # A and B, each once
    assert backward["_to_copy"] == 4  # A and B again, which costs less than keeping them; dA and dB


def test_dropout_copies_the_input_once_each_way() -> None:
    forward, backward = counted(torch.float32, 0.05)
    assert forward["clone"] == 1 and backward["clone"] == 2  # dB is laid out as B is
    assert forward["rand"] == 1 and "rand" not in backward
    assert forward.total() <= 22 and backward.total() <= 20


def of_rows(
    names: list[str], size: int, *, grad: bool = False, dtype: torch.dtype = torch.float32
) -> Counter[str]:
    """Operations for one token of each row, after the stacked factors have been made."""
    torch.manual_seed(0)
    layer: nn.Module = nn.Linear(size, size).to(dtype)
    for name in dict.fromkeys(names):
        layer = wrap(layer, LoraConfig(r=16, init_lora_weights=False), name)
    layer.requires_grad_(grad)
    x = torch.randn(len(names), 1, size).to(dtype)
    with torch.set_grad_enabled(grad), routed(layer, names):
        for _ in range(3):
            with Count() as seen:
                layer(x)
    return seen.calls


def test_a_token_of_many_adapters_takes_three_calls_beside_the_base() -> None:
    for count in (2, 8, 32):
        calls = of_rows([str(row) for row in range(count)], 64)
        assert calls == {"addmm": 1, "bmm": 1, "mul": 1, "baddbmm_": 1}


def test_scattered_rows_are_copied_once_each_way() -> None:
    calls = of_rows(["a", "b"] * 64, 576)
    assert calls == {"addmm": 1, "index": 2, "bmm": 1, "mul": 1, "baddbmm_": 1, "index_copy_": 1}


def test_in_training_adapters_with_equally_many_rows_share_two_thin_products_in_16_bits() -> None:
    """Besides the base's product. Rows are views, and only the factors of such neighbours are stacked."""
    calls = of_rows(["a", "b", "c"], 64, grad=True, dtype=torch.bfloat16)
    assert calls["addmm"] == calls["bmm"] == calls["baddbmm_"] == 1
    assert calls["_foreach_copy_"] == calls["empty"] == 2
    assert not {"clone", "copy_", "mm", "addmm_", "index", "cat"} & set(calls)


@pytest.mark.parametrize("names", [["a", "b", "c"], ["a", "a", "b", "c", "c", "c"]])
def test_in_training_each_adapter_has_two_thin_products_and_copies_nothing(names: list[str]) -> None:
    calls = of_rows(names, 64, grad=True)
    assert calls["addmm"] == 1 and calls["mm"] == calls["addmm_"] == 3
    assert set(calls) <= {"addmm", "mm", "addmm_", "slice"}


def test_the_counter_sees_what_it_should() -> None:
    with Count() as seen:
        (torch.ones(2, 3) @ torch.ones(3, 2)).mul_(2.0)
    assert seen.calls == {"ones": 2, "mm": 1, "mul_": 1}
