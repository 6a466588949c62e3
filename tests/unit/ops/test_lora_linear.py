"""The fused linear step against its plain twin: values and gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from tests.tolerances import assert_close
from tests.unit.ops.cases import (
    NAMES,
    SCALING,
    assert_same,
    exact,
    gradients,
    keep_mask,
    second_derivatives,
    tensors,
)
from veneer.ops.dropout import draw
from veneer.ops.lora_linear import FEW_ROWS, add_lora_, lora_linear, lora_linear_reference

SHAPES = [(24,), (7, 24), (3, 5, 24), (2, 3, 4, 24), (1, 24), (0, 24), (2, 0, 24)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
#: Enough elements for the sparse form, too few, and p on both sides of the crossing.
DROPOUTS = [((80, 64), 0.05), ((80, 64), 0.3), ((80, 64), 0.9), ((3, 5, 24), 0.3), ((0, 24), 0.3)]


def fused(given: dict[str, Tensor | None], p: float = 0.0, scaling: float = SCALING) -> Tensor:
    return lora_linear(*(given[name] for name in NAMES), scaling, p)  # type: ignore[arg-type]


def twin(given: dict[str, Tensor | None], p: float = 0.0, mask: Tensor | None = None) -> Tensor:
    return lora_linear_reference(*(given[name] for name in NAMES), SCALING, p, mask)  # type: ignore[arg-type]


def assert_twin(given: dict[str, Tensor | None], dtype: torch.dtype) -> None:
    expected = exact(given)
    y, reference = fused(given), twin(expected)
    assert y.dtype == given["x"].dtype  # type: ignore[union-attr]
    assert_same({"y": y}, {"y": reference}, dtype)
    assert_same(gradients(y, given), gradients(reference, expected), dtype)


def test_the_twin_is_the_dense_formula() -> None:
    given = tensors(dtype=torch.float64)
    x, W, b, A, B, b_B = (given[name] for name in NAMES)
    dense = x @ (W + SCALING * B @ A).t() + b + SCALING * b_B  # type: ignore[operator, union-attr]
    assert_close(twin(given), dense)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_twin(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_twin(tensors(shape, dtype=dtype), dtype)


@pytest.mark.parametrize("r", [1, 4, 40])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("B_bias", [False, True])
def test_equals_the_twin_with_and_without_biases(bias: bool, B_bias: bool, r: int) -> None:
    assert_twin(tensors(r=r, bias=bias, B_bias=B_bias), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_factors_on_a_16_bit_base(dtype: torch.dtype) -> None:
    given = tensors((3, 5, 24), dtype=dtype, factor_dtype=torch.float32)
    assert_twin(given, dtype)
    found = gradients(fused(given), given)
    assert {name: grad.dtype for name, grad in found.items()} == {
        **dict.fromkeys(("x", "weight", "bias"), dtype),
        **dict.fromkeys(("A", "B", "B_bias"), torch.float32),
    }


@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x.permute(2, 0, 1),
        lambda x: x[:, ::2],
        lambda x: x[..., ::2],
        lambda x: x[:1].expand(6, -1, -1),
        lambda x: x.transpose(-1, -2),
    ],
)
def test_non_contiguous_inputs(strided: Callable[[Tensor], Tensor]) -> None:
    leaf = torch.randn(4, 6, 8, requires_grad=True)
    x = strided(leaf)
    given = {**tensors((2, x.shape[-1])), "x": x}
    assert not x.is_contiguous()
    expected = exact(given)
    y = fused(given)
    assert y.is_contiguous()
    assert_same({"y": y}, {"y": twin(expected)}, torch.float32)
    assert_same(gradients(y, given), gradients(twin(expected), expected), torch.float32)
    given["x"], again = leaf, {**given, "x": leaf}
    whole = gradients(twin({**given, "x": strided(leaf)}), again)
    assert_same(gradients(fused({**given, "x": strided(leaf)}), again), whole, torch.float32)


def test_an_expanded_gradient() -> None:
    given = tensors((3, 5, 24))
    y = fused(given)
    expected = twin(given)
    for name in NAMES:
        ours, theirs = (
            torch.autograd.grad(out.sum(), given[name], retain_graph=True) for out in (y, expected)
        )
        assert_same({name: ours[0]}, {name: theirs[0]}, torch.float32)


def test_every_subset_of_gradients() -> None:
    for chosen in itertools.product([False, True], repeat=len(NAMES)):
        given = tensors(dtype=torch.float64)
        for name, wanted in zip(NAMES, chosen, strict=True):
            given[name].requires_grad_(wanted)  # type: ignore[union-attr]
        y, reference = fused(given), twin(given)
        assert y.requires_grad == any(chosen)
        if any(chosen):
            assert_same(gradients(y, given), gradients(reference, given), torch.float64)


@pytest.mark.parametrize(("shape", "p"), DROPOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_equals_the_twin_with_the_same_mask(
    shape: tuple[int, ...], p: float, dtype: torch.dtype
) -> None:
    given = tensors(shape, dtype=dtype)
    torch.manual_seed(5)
    mask = keep_mask(given["x"], draw(given["x"], p))  # type: ignore[arg-type]
    torch.manual_seed(5)
    y = fused(given, p)
    expected = exact(given)
    reference = twin(expected, p, mask)
    assert_same({"y": y}, {"y": reference}, dtype)
    assert_same(gradients(y, given), gradients(reference, expected), dtype)


def test_dropping_everything_leaves_the_base_and_the_branch_bias() -> None:
    given = tensors((80, 64))
    y = fused(given, 1.0)
    x, W, b, _, _, b_B = (given[name] for name in NAMES)
    assert_close(y, torch.nn.functional.linear(x, W, b) + SCALING * b_B)  # type: ignore[arg-type, operator]
    found = gradients(y, given)
    assert not found["A"].any() and not found["B"].any() and found["B_bias"].all()


def test_dropout_repeats_with_the_seed_and_differs_without() -> None:
    given = tensors((80, 64))
    torch.manual_seed(3)
    first, second = fused(given, 0.1), fused(given, 0.1)
    torch.manual_seed(3)
    assert torch.equal(fused(given, 0.1), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_what_is_no_probability_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match="probability"):
        fused(tensors(), p)


def test_shapes_that_do_not_fit_raise() -> None:
    given = tensors()
    with pytest.raises(RuntimeError):
        fused({**given, "x": torch.randn(7, 23)})
    with pytest.raises(RuntimeError):
        fused({**given, "A": torch.randn(4, 23)})


def test_the_output_is_a_fresh_tensor_that_may_be_written() -> None:
    for shape in SHAPES:
        y = fused(tensors(shape))
        assert not y._is_view() and y.is_contiguous(), shape
    given = tensors((3, 5, 24))
    assert_same(gradients(fused(given).relu_(), given), gradients(twin(given).relu(), given), torch.float32)


def test_an_input_overwritten_before_backward_is_noticed() -> None:
    given = tensors()
    given["x"] = given["x"].detach().clone()  # type: ignore[union-attr]
    y = fused(given)
    given["x"].add_(1.0)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_one_layer_used_twice_in_a_graph() -> None:
    given = tensors((6, 20), out=20)

    def twice(step: Callable[[dict[str, Any]], Tensor]) -> Tensor:
        return step({**given, "x": torch.tanh(step(given))}) + step({**given, "x": given["x"] * 2})  # type: ignore[operator]

    assert_same(gradients(twice(fused), given), gradients(twice(twin), given), torch.float32)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("shape", "p"), [((6, 20), 0.0), ((6, 20), 0.3), ((300, 20), 0.1)])
def test_checkpointing_replays_the_dropout(reentrant: bool, shape: tuple[int, ...], p: float) -> None:
    given = tensors(shape, out=20)

    def block(x: Tensor) -> Tensor:
        return fused({**given, "x": torch.tanh(fused({**given, "x": x}, p))}, p)

    torch.manual_seed(9)
    expected = gradients(block(given["x"]), given)  # type: ignore[arg-type]
    torch.manual_seed(9)
    y = checkpoint(block, given["x"], use_reentrant=reentrant)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    assert_same({n: given[n].grad for n in NAMES}, expected, torch.float32)  # type: ignore[misc, union-attr]


@pytest.mark.parametrize(("p", "per_input"), [(0.0, 0.0), (0.05, 4 * 0.05)])
def test_saved_for_backward(p: float, per_input: float) -> None:
    """X, an h of r columns, the factors, 4 bytes a dropped element; no mask, no second X, nothing T x out."""
    given = tensors((256, 64), out=96, r=4, bias=False, B_bias=False)
    given["weight"].requires_grad_(False)  # type: ignore[union-attr]
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = fused(given, p)
    for name in ("x", "weight", "A", "B"):
        held.pop(given[name].untyped_storage().data_ptr())  # type: ignore[union-attr]
    beyond = 256 * 4 * 4 + per_input * 256 * 64
    assert beyond * 0.8 <= sum(held.values()) <= beyond * 1.2
    assert y.requires_grad


@pytest.mark.parametrize("rows", [(), (1,), (0,), (2, FEW_ROWS // 2), (FEW_ROWS + 1,)])
@pytest.mark.parametrize("factor_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_gradients(
    dtype: torch.dtype, factor_dtype: torch.dtype | None, rows: tuple[int, ...]
) -> None:
    given = tensors((*rows, 24), dtype=dtype, factor_dtype=factor_dtype)
    with torch.no_grad():
        y = fused(given)
        factors = (given["A"], given["B"], given["B_bias"])
        base = torch.nn.functional.linear(given["x"], given["weight"], given["bias"])  # type: ignore[arg-type]
        kept = base.clone()
        added = add_lora_(base, given["x"], *factors, SCALING, 0.0)  # type: ignore[arg-type]
    assert y.dtype == added.dtype == dtype
    assert not y._is_view() and not y.requires_grad
    assert torch.equal(base, kept)
    for result in (y, added):
        assert_same({"y": result}, {"y": twin(exact(given))}, dtype)


def test_nothing_is_saved_without_gradients() -> None:
    given = {name: t.detach() for name, t in tensors().items() if t is not None}
    assert fused(given).grad_fn is None


@pytest.mark.parametrize(("shape", "p"), [((24,), 0.0), ((7, 24), 0.0), ((2, 3, 24), 0.3), ((80, 64), 0.1)])
def test_second_derivatives_equal_the_twin(shape: tuple[int, ...], p: float) -> None:
    given = tensors(shape, dtype=torch.float64)
    torch.manual_seed(5)
    mask = keep_mask(given["x"], draw(given["x"], p)) if p else None  # type: ignore[arg-type]
    torch.manual_seed(5)
    assert_same(
        second_derivatives(fused(given, p), given),
        second_derivatives(twin(given, p, mask), given),
        torch.float64,
    )


def test_second_derivatives_for_every_subset_of_gradients() -> None:
    for chosen in itertools.product([False, True], repeat=len(NAMES)):
        given = tensors(dtype=torch.float64)
        for name, wanted in zip(NAMES, chosen, strict=True):
            given[name].requires_grad_(wanted)  # type: ignore[union-attr]
        need_x, need_w, _, need_a, need_b, _ = chosen
        if (
            need_b and need_x and not need_a and not need_w
        ):  # the one subset for which x would be kept only for this
            with pytest.raises(RuntimeError, match="frozen A"):
                second_derivatives(fused(given), given)
        elif any(chosen):
            assert_same(
                second_derivatives(fused(given), given),
                second_derivatives(twin(given), given),
                torch.float64,
            )


def test_the_hessian_of_an_adapted_layer() -> None:
    given = tensors((2, 5), out=4, r=3, dtype=torch.float64)

    def hessian(step: Callable[..., Tensor], vectorize: bool = False) -> Tensor:
        def of_x(x: Tensor) -> Tensor:
            return step({**given, "x": x}).pow(3).sum()

        found: Tensor = torch.autograd.functional.hessian(of_x, given["x"], vectorize=vectorize)
        return found

    expected = hessian(twin)
    assert expected.any()
    assert_close(hessian(fused), expected)
    assert_close(hessian(fused, vectorize=True), expected)


def test_gradients_of_any_order_are_those_of_differences() -> None:
    given = tensors((2, 5), out=3, r=2, dtype=torch.float64)
    inputs = tuple(given[name] for name in NAMES)
    assert torch.autograd.gradcheck(lambda *t: lora_linear(*t, SCALING, 0.0), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: lora_linear(*t, SCALING, 0.0), inputs)


def test_first_derivatives_are_the_same_with_create_graph() -> None:
    for dtype in DTYPES:
        given = tensors((80, 64), dtype=dtype, factor_dtype=torch.float32)
        y = fused(given, 0.1)
        wanted = [given[name] for name in NAMES]
        noise = torch.randn(y.shape).to(dtype)
        plain = torch.autograd.grad(y, wanted, noise, retain_graph=True)  # type: ignore[arg-type]
        graph = torch.autograd.grad(y, wanted, noise, create_graph=True)  # type: ignore[arg-type]
        assert_same(dict(zip(NAMES, graph, strict=True)), dict(zip(NAMES, plain, strict=True)), dtype)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own jvp
def test_function_transforms_take_the_twin() -> None:
    given = tensors((5, 24), dtype=torch.float64)

    def of_A(A: Tensor) -> Tensor:
        return fused({**given, "A": A}).square().sum()

    A = given["A"]
    expected = torch.autograd.grad(twin(given).square().sum(), A)[0]  # type: ignore[arg-type]
    assert_close(torch.func.grad(of_A)(A), expected)
    per_row = torch.func.vmap(lambda row: fused({**given, "x": row}))(given["x"])
    assert_close(per_row, twin(given))
    tangent = torch.ones_like(A)  # type: ignore[arg-type]
    _, slope = torch.func.jvp(of_A, (A,), (tangent,))
    assert_close(slope, expected.sum())
    with forward_ad.dual_level():
        y = of_A(forward_ad.make_dual(A.detach(), tangent))  # type: ignore[union-attr]
        assert_close(forward_ad.unpack_dual(y).tangent, expected.sum())


def test_tensor_subclasses_take_the_twin() -> None:
    class Marked(Tensor):
        pass

    given = tensors()
    y = fused({**given, "x": given["x"].as_subclass(Marked)})  # type: ignore[union-attr]
    assert isinstance(y, Marked)
    assert_close(y.as_subclass(Tensor), twin(given))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_under_autocast(x_dtype: torch.dtype) -> None:
    given = tensors((3, 5, 24), dtype=x_dtype if x_dtype == torch.float64 else torch.float32)
    given["x"] = given["x"].detach().to(x_dtype).requires_grad_()  # type: ignore[union-attr]
    with torch.autocast("cpu", torch.bfloat16):
        y, reference = fused(given), twin(given)
    assert y.dtype == reference.dtype == (x_dtype if x_dtype == torch.float64 else torch.bfloat16)
    assert_same({"y": y}, {"y": reference}, torch.bfloat16)
    found = gradients(y, given)
    assert_same(found, gradients(reference, given), torch.bfloat16)
    assert all(grad.dtype == given[name].dtype for name, grad in found.items())  # type: ignore[union-attr]


def test_a_backward_inside_autocast_stays_in_the_forward_dtype() -> None:
    given = tensors()
    y = fused(given)
    with torch.autocast("cpu", torch.bfloat16):
        inside = gradients(y, given)
    assert_same(inside, gradients(twin(given), given), torch.float32)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_tensors_without_storage_get_their_shapes(p: float) -> None:
    given = {name: torch.empty_like(t, device="meta") for name, t in tensors((3, 5, 24)).items()}
    for tensor in given.values():
        tensor.requires_grad_()
    y = fused(given, p)
    assert y.device.type == "meta" and y.shape == (3, 5, 20)
    assert {
        name: grad.shape
        for name, grad in zip(given, torch.autograd.grad(y.sum(), [*given.values()]), strict=True)
    } == {name: tensor.shape for name, tensor in given.items()}
    added = add_lora_(y, given["x"], given["A"], given["B"], given["B_bias"], SCALING, p)
    assert added.device.type == "meta" and added.shape == y.shape


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compiles_into_one_graph(p: float) -> None:
    given = tensors((6, 24), bias=False, B_bias=False)
    step = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    torch.manual_seed(2)
    y = step(*(given[name] for name in NAMES), SCALING, p)
    found = gradients(y, given)
    torch.manual_seed(2)
    reference = twin(given, p)
    assert_same({"y": y}, {"y": reference}, torch.float32)
    assert_same(found, gradients(reference, given), torch.float32)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)  # its imports
def test_compiles_with_inductor() -> None:
    given = tensors((6, 24), B_bias=False)
    y = torch.compile(lora_linear, fullgraph=True)(*(given[name] for name in NAMES), SCALING, 0.0)
    reference = twin(given)
    assert_same({"y": y}, {"y": reference}, torch.float32)
    assert_same(gradients(y, given), gradients(reference, given), torch.float32)


@torch.no_grad()
def test_rows_without_elements_are_still_rows() -> None:
    """Nothing comes in: each row is the biases; it is not one row because there is not one element."""
    x, weight, bias = torch.ones(3, 0), torch.ones(5, 0), torch.arange(5.0)
    A, B, B_bias = torch.ones(2, 0), torch.ones(5, 2), torch.ones(5)
    assert_close(lora_linear(x, weight, bias, A, B, B_bias, 2.0, 0.0), (bias + 2.0).expand(3, 5))
