"""The branch added to the output of a base layer that is a black box."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.tolerances import assert_close
from tests.unit.ops.cases import (
    SCALING,
    assert_same,
    exact,
    gradients,
    keep_mask,
    second_derivatives,
    tensors,
)
from veneer.ops.dropout import draw
from veneer.ops.lora_linear import add_lora_, lora_linear_reference

SHAPES = [(24,), (7, 24), (3, 5, 24), (2, 3, 4, 24), (0, 24)]


def opaque(given: dict[str, Any]) -> Tensor:
    """A base layer whose output is its own fresh tensor and differentiable."""
    return nn.functional.linear(given["x"], given["weight"], given["bias"]) * 1.0


def added(given: dict[str, Any], p: float = 0.0, *, inplace: bool = False) -> Tensor:
    factors = (given["A"], given["B"], given["B_bias"])
    return add_lora_(opaque(given), given["x"], *factors, SCALING, p, inplace=inplace)


def twin(given: dict[str, Any], p: float = 0.0, mask: Tensor | None = None) -> Tensor:
    names = ("x", "weight", "bias", "A", "B", "B_bias")
    return lora_linear_reference(*(given[name] for name in names), SCALING, p, mask)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_twin(shape: tuple[int, ...], dtype: torch.dtype, inplace: bool) -> None:
    given = tensors(shape, dtype=dtype)
    expected = exact(given)
    y, reference = added(given, inplace=inplace), twin(expected)
    assert_same({"y": y}, {"y": reference}, dtype)
    assert_same(gradients(y, given), gradients(reference, expected), dtype)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("shape", "p"), [((80, 64), 0.05), ((80, 64), 0.9), ((6, 24), 0.3)])
def test_dropout_equals_the_twin_with_the_same_mask(shape: tuple[int, ...], p: float, inplace: bool) -> None:
    given = tensors(shape)
    torch.manual_seed(5)
    mask = keep_mask(given["x"], draw(given["x"], p))  # type: ignore[arg-type]
    torch.manual_seed(5)
    y = added(given, p, inplace=inplace)
    reference = twin(given, p, mask)
    assert_same({"y": y}, {"y": reference}, torch.float32)
    assert_same(gradients(y, given), gradients(reference, given), torch.float32)


@pytest.mark.parametrize("names", [("A",), ("B",), ("B_bias",), ("x",), ("x", "A"), ("A", "B"), ("weight",)])
def test_subsets_of_gradients(names: tuple[str, ...]) -> None:
    given = tensors(dtype=torch.float64)
    for name, tensor in given.items():
        tensor.requires_grad_(name in names)  # type: ignore[union-attr]
    for inplace in (False, True):
        found = gradients(added(given, inplace=inplace), given)
        assert_same(found, gradients(twin(given), given), torch.float64)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("y_dtype", "x_dtype", "factor_dtype"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
    ],
)
def test_mixed_dtypes(
    y_dtype: torch.dtype, x_dtype: torch.dtype, factor_dtype: torch.dtype, inplace: bool
) -> None:
    given = tensors(dtype=x_dtype, factor_dtype=factor_dtype)
    factors = {name: given[name] for name in ("x", "A", "B", "B_bias")}
    base = torch.randn(7, 20).to(y_dtype)
    y = add_lora_(base.clone(), *factors.values(), SCALING, 0.0, inplace=inplace)  # type: ignore[arg-type]
    assert y.dtype == y_dtype
    wide = {name: tensor for name, tensor in exact(given).items() if name in factors}
    zero = {"weight": torch.zeros(20, 24, dtype=torch.float64), "bias": None}
    branch = twin({**wide, **zero})
    assert_same({"y": y}, {"y": base.double() + branch}, torch.bfloat16)
    found = gradients(y, factors)
    assert_same(found, gradients(branch, wide), torch.bfloat16)
    assert all(grad.dtype == factors[name].dtype for name, grad in found.items())  # type: ignore[union-attr]


def test_in_place_is_in_place_and_otherwise_it_is_not() -> None:
    given = tensors()
    args = (given["x"], given["A"], given["B"], given["B_bias"], SCALING, 0.0)
    base = torch.randn(7, 20)
    kept = base.clone()
    out = add_lora_(base, *args)  # type: ignore[arg-type]
    assert torch.equal(base, kept) and not out._is_view()
    assert add_lora_(base, *args, inplace=True) is base  # type: ignore[arg-type]
    assert_close(base, out)
    assert base.requires_grad


def test_what_must_not_be_written_is_copied() -> None:
    given = tensors()
    args = (given["x"], given["A"], given["B"], given["B_bias"], SCALING, 0.0)
    with torch.inference_mode():
        inference = torch.randn(7, 20)
    views = [
        torch.randn(8, 20)[1:],
        torch.randn(20, 7).t(),
        torch.randn(20).expand(7, 20),
        torch.randn(7, 20, requires_grad=True),
        inference,
    ]
    for y in views:
        kept = y.detach().clone()
        out = add_lora_(y, *args, inplace=True)  # type: ignore[arg-type]
        assert torch.equal(y, kept) and out is not y and out.is_contiguous()


def test_writing_what_the_base_saved_is_noticed() -> None:
    given = tensors()
    y = torch.tanh(opaque(given))  # tanh saves its output
    out = add_lora_(y, given["x"], given["A"], given["B"], None, SCALING, 0.0, inplace=True)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_several_adapters_on_one_output() -> None:
    given, second = tensors(), tensors(r=3, seed=7)
    y = add_lora_(opaque(given), given["x"], given["A"], given["B"], None, 2.0, 0.0, inplace=True)  # type: ignore[arg-type]
    y = add_lora_(y, given["x"], second["A"], second["B"], None, 0.5, 0.0, inplace=True)  # type: ignore[arg-type]
    x, W, b, A, B, _ = given.values()
    dense = W + 2.0 * B @ A + 0.5 * second["B"] @ second["A"]  # type: ignore[operator]
    wanted = {"x": x, "A": A, "second": second["A"]}
    reference = nn.functional.linear(x, dense, b)  # type: ignore[arg-type]
    assert_same({"y": y}, {"y": reference}, torch.float32)
    assert_same(gradients(y, wanted), gradients(reference, wanted), torch.float32)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_the_dropout(reentrant: bool) -> None:
    given = tensors((80, 64))
    torch.manual_seed(4)
    expected = gradients(added(given, 0.2, inplace=True), given)
    torch.manual_seed(4)
    y = checkpoint(lambda x: added({**given, "x": x}, 0.2, inplace=True), given["x"], use_reentrant=reentrant)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    assert_same({n: t.grad for n, t in given.items()}, expected, torch.float32)  # type: ignore[misc, union-attr]


def test_under_autocast() -> None:
    given = tensors((3, 5, 24))
    with torch.autocast("cpu", torch.bfloat16):
        y, reference = added(given), twin(given)
    assert y.dtype == reference.dtype == torch.bfloat16
    assert_same({"y": y}, {"y": reference}, torch.bfloat16)
    assert_same(gradients(y, given), gradients(reference, given), torch.bfloat16)


def test_function_transforms_take_the_twin() -> None:
    given = tensors(dtype=torch.float64)

    def of_B(B: Tensor) -> Tensor:
        return added({**given, "B": B}, inplace=True).square().sum()

    expected = torch.autograd.grad(twin(given).square().sum(), [given["B"]])[0]  # type: ignore[list-item]
    assert_close(torch.func.grad(of_B)(given["B"]), expected)


def test_compiles_into_one_graph() -> None:
    given = tensors(B_bias=False)
    y = torch.compile(added, fullgraph=True, backend="aot_eager")(given, inplace=True)
    assert_same({"y": y}, {"y": twin(given)}, torch.float32)
    assert_same(gradients(y, given), gradients(twin(given), given), torch.float32)


def test_shapes_that_do_not_fit_are_refused() -> None:
    given = tensors()
    with pytest.raises(ValueError, match="must agree but for the last dimension"):
        add_lora_(torch.zeros(6, 20), given["x"], given["A"], given["B"], None, 1.0, 0.0)  # type: ignore[arg-type]
    y = torch.zeros(7, 21)
    with pytest.raises(RuntimeError):
        add_lora_(y, given["x"], given["A"], given["B"], None, 1.0, 0.0, inplace=True)  # type: ignore[arg-type]
    assert not y.any()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("shape", "p"), [((24,), 0.0), ((7, 24), 0.0), ((2, 3, 24), 0.3), ((80, 64), 0.1)])
def test_second_derivatives_equal_the_twin(shape: tuple[int, ...], p: float, inplace: bool) -> None:
    given = tensors(shape, dtype=torch.float64)
    torch.manual_seed(5)
    mask = keep_mask(given["x"], draw(given["x"], p)) if p else None
    torch.manual_seed(5)
    found = second_derivatives(added(given, p, inplace=inplace), given)
    assert_same(found, second_derivatives(twin(given, p, mask), given), torch.float64)


def test_second_derivatives_with_a_frozen_a_are_refused_not_wrong() -> None:
    given = tensors(dtype=torch.float64)
    given["A"].requires_grad_(False)
    with pytest.raises(RuntimeError, match="frozen A"):
        second_derivatives(added(given), given)
    given["x"].requires_grad_(False)
    assert_same(
        second_derivatives(added(given), given), second_derivatives(twin(given), given), torch.float64
    )
