"""The Triton step against the plain twin: in Triton's interpreter with TRITON_INTERPRET=1, else on CUDA.

`test_triton_lora` runs this file in a process of its own: Triton reads the variable when it is imported.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from triton.runtime import interpreter

from tests.pairwise import combined
from tests.unit.ops.cases import (
    NAMES,
    SCALING,
    assert_same,
    exact,
    gradients,
    second_derivatives,
    tensors,
)
from veneer.ops import triton_lora
from veneer.ops.lora_linear import lora_linear_reference
from veneer.ops.triton_lora import Dropout, TritonLora

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: One element, one block, several blocks of each kernel with none of them whole; empty ones.
SHAPES = [(24,), (7, 24), (3, 50, 300), (0, 24), (2, 0, 24)]
#: Two-sided false-alarm rate of one z-test: 5.7e-7, for seeds drawn anew; these are fixed.
Z_BOUND = 5.0

if INTERPRETED:
    multiply = interpreter.InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        """The interpreter keeps bfloat16 as integers of 16 bits, and its product would multiply those."""
        if handle.dtype != tl.bfloat16:
            return handle
        data = interpreter._convert_float(handle.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    interpreter.InterpreterBuilder.create_dot = lambda builder, a, b, *more: multiply(
        builder, widened(a), widened(b), *more
    )


def made(*shape: Any, **options: Any) -> dict[str, Tensor | None]:
    """`tensors`, on the device."""
    given = tensors(*shape, **options)
    return {name: None if t is None else t.detach().to(DEVICE).requires_grad_() for name, t in given.items()}


def step(given: dict[str, Tensor | None], p: float = 0.0) -> Tensor:
    y: Tensor = TritonLora.apply(*(given[name] for name in NAMES), SCALING, p)  # type: ignore[no-untyped-call]
    return y


def twin(given: dict[str, Tensor | None], p: float = 0.0, mask: Tensor | None = None) -> Tensor:
    return lora_linear_reference(*(given[name] for name in NAMES), SCALING, p, mask)  # type: ignore[arg-type]


def mask_of(x: Tensor, p: float, seed: int) -> Tensor:
    """What a step keeps of x after torch.manual_seed(seed)."""
    torch.manual_seed(seed)
    drawn = torch.randint(2**63 - 1, (1,), device=DEVICE)
    return Dropout.of(drawn, p).mask(math.prod(x.shape[:-1]), x.shape[-1]).view(x.shape)


def assert_twin(given: dict[str, Tensor | None], dtype: torch.dtype, p: float = 0.0) -> None:
    mask = mask_of(given["x"], p, seed=5) if p else None  # type: ignore[arg-type]
    torch.manual_seed(5)
    y, expected = step(given, p), exact(given)
    reference = twin(expected, p, mask)
    assert y.dtype == dtype and y.is_contiguous() and not y._is_view()
    assert_same({"y": y}, {"y": reference}, dtype)
    assert_same(gradients(y, given), gradients(reference, expected), dtype)


@pytest.mark.parametrize(("shape", "dtype", "p"), combined(SHAPES, DTYPES, [0.0, 0.3]))
def test_equals_the_twin(shape: tuple[int, ...], dtype: torch.dtype, p: float) -> None:
    assert_twin(made(shape, out=270, r=5, dtype=dtype), dtype, p)


@pytest.mark.parametrize(("bias", "B_bias", "r"), combined([False, True], [False, True], [1, 100, 256]))
def test_with_and_without_biases(bias: bool, B_bias: bool, r: int) -> None:
    assert_twin(made(r=r, bias=bias, B_bias=B_bias), torch.float32, 0.3)


@pytest.mark.parametrize("p", [1e-3, 0.05, 0.95])
def test_rare_and_frequent_dropout(p: float) -> None:
    assert_twin(made((40, 64)), torch.float32, p)


@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2],
        lambda x: x[..., ::2],
        lambda x: x[..., 3:20],
        lambda x: x[:1].expand(6, -1, -1),
        lambda x: x.transpose(-1, -2),
    ],
)
def test_non_contiguous_inputs(strided: Callable[[Tensor], Tensor]) -> None:
    x = strided(torch.randn(4, 6, 40, device=DEVICE)).requires_grad_()
    assert not x.is_contiguous()
    assert_twin({**made((2, x.shape[-1])), "x": x}, torch.float32, 0.3)


def test_strided_weights_and_factors() -> None:
    given = made((7, 24))
    for name in ("weight", "A", "B"):
        given[name] = given[name].detach().t().contiguous().t().requires_grad_()  # type: ignore[union-attr]
    assert_twin(given, torch.float32, 0.3)


def test_an_expanded_gradient() -> None:
    given = made((3, 5, 24))
    y, expected = step(given), twin(given)
    for name in NAMES:
        ours, theirs = (
            torch.autograd.grad(out.sum(), given[name], retain_graph=True)[0] for out in (y, expected)
        )
        assert_same({name: ours}, {name: theirs}, torch.float32)


def test_every_subset_of_gradients() -> None:
    names = ("x", "weight", "A", "B", "bias")
    for chosen in itertools.product([False, True], repeat=len(names)):
        given = made(B_bias=False)
        for name, wanted in zip(names, chosen, strict=True):
            given[name].requires_grad_(wanted)  # type: ignore[union-attr]
        if any(chosen):
            assert_twin(given, torch.float32, 0.3)
        assert step(given).requires_grad == any(chosen)


def test_dropout_repeats_with_the_seed_and_differs_without() -> None:
    given = made((40, 64))
    torch.manual_seed(3)
    first, second = step(given, 0.1), step(given, 0.1)
    torch.manual_seed(3)
    assert torch.equal(step(given, 0.1), first)
    assert not torch.equal(first, second)


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 as its paper has it: ``(4, n) -> (4, n)`` words."""
    low, k0, k1 = 0xFFFFFFFF, *key
    c0, c1, c2, c3 = counter.astype(object)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & low, (p0 >> 32) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return np.stack([c0, c1, c2, c3])


def test_the_mask_is_philox() -> None:
    # The first words that the authors' own table of known answers has, for counter and key zero.
    known = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox(np.zeros((4, 1), int), (0, 0)).ravel().tolist() == known
    rows, groups, seed, p = 70, 20, 0x0123456789ABCDEF, 0.3
    row, group = np.divmod(np.arange(rows * groups), groups)
    words = philox(np.stack([group, row, 0 * row, 0 * row]), (seed & 0xFFFFFFFF, seed >> 32))
    expected = torch.tensor((words >= round(p * 2**32)).astype(bool)).view(4, rows, groups)
    expected = expected.permute(1, 2, 0).reshape(rows, 4 * groups)
    for width in (4 * groups, 4 * groups - 3):
        found = Dropout.of(torch.tensor([seed], device=DEVICE), p).mask(rows, width)
        assert torch.equal(found.cpu(), expected[:, :width])


@pytest.mark.parametrize("p", [0.001, 0.05, 0.3, 0.95])
def test_the_share_that_is_dropped(p: float) -> None:
    parts = [~mask_of(torch.empty(256, 256), p, seed) for seed in range(2)]
    dropped = torch.stack(parts).double()
    centred = (dropped - p) / math.sqrt(p * (1 - p))
    scores = {
        "total": centred.sum() / math.sqrt(centred.numel()),
        "neighbours in a row": (centred[..., 1:] * centred[..., :-1]).sum() / math.sqrt(2 * 256 * 255),
        "neighbours in a column": (centred[:, 1:] * centred[:, :-1]).sum() / math.sqrt(2 * 256 * 255),
        "two seeds": (centred[0] * centred[1]).sum() / 256,
    }
    assert not {name: float(z) for name, z in scores.items() if not abs(z) < Z_BOUND}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_the_dropout(reentrant: bool) -> None:
    given = made((6, 20), out=20)

    def block(x: Tensor) -> Tensor:
        return step({**given, "x": torch.tanh(step({**given, "x": x}, 0.3))}, 0.3)

    torch.manual_seed(9)
    expected = gradients(block(given["x"]), given)  # type: ignore[arg-type]
    torch.manual_seed(9)
    y = checkpoint(block, given["x"], use_reentrant=reentrant)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y))
    assert_same({n: given[n].grad for n in NAMES}, expected, torch.float32)  # type: ignore[misc, union-attr]


def test_a_backward_inside_an_autocast_region() -> None:
    given = made()
    expected = gradients(step(given), given)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        found = gradients(step(given), given)
    assert_same(found, expected, torch.float32)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_second_derivatives_equal_the_twin(p: float) -> None:
    given = made()
    mask = mask_of(given["x"], p, seed=5) if p else None  # type: ignore[arg-type]
    torch.manual_seed(5)
    found = second_derivatives(step(given, p), given)
    expected = exact(given)
    assert_same(found, second_derivatives(twin(expected, p, mask), expected), torch.float32)


def test_second_derivatives_without_the_input_raise() -> None:
    given = made()
    for name in ("A", "weight"):
        given[name].requires_grad_(False)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="frozen A"):
        second_derivatives(step(given), given)


def test_saved_for_backward() -> None:
    """X, an h of r columns, the factors and eight bytes of a seed; no mask, no second X, nothing T x out."""
    given = made((256, 64), out=96, r=4, bias=False, B_bias=False)
    given["weight"].requires_grad_(False)  # type: ignore[union-attr]
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = step(given, 0.05)
    for name in ("x", "weight", "A", "B"):
        held.pop(given[name].untyped_storage().data_ptr())  # type: ignore[union-attr]
    assert sorted(held.values()) == [8, 256 * 4 * 4]
    assert y.requires_grad


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_the_kernels_agree_with_torch_on_this_device(dtype: torch.dtype) -> None:
    state = torch.get_rng_state()
    assert triton_lora.disagreement(DEVICE, dtype) is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("projection", lambda right: right * 1.05, "projection is off"),
        (
            "product",
            lambda right: right.index_fill_(0, torch.tensor([3], device=DEVICE), 0.0),
            "output is off",
        ),
        ("correlation", lambda right: right * float("nan"), "gradient of A is off"),
    ],
)
def test_a_disagreement_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, wrong: Callable[[Tensor], Tensor], words: str
) -> None:
    kernel = getattr(triton_lora, name)
    monkeypatch.setattr(triton_lora, name, lambda *given: wrong(kernel(*given)))
    assert words in str(triton_lora.disagreement(DEVICE, torch.bfloat16))


def test_a_mask_of_another_share_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dropout, "mask", lambda self, *size: torch.ones(size, device=DEVICE).bool())
    monkeypatch.setattr(Dropout, "of", classmethod(lambda cls, seed, p: cls(None, 0)))
    assert "dropout drops 0.000" in str(triton_lora.disagreement(DEVICE, torch.bfloat16))
