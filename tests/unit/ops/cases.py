"""Tensors for the tests of ops, of about unit size whatever the shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.tolerances import BY_DTYPE, assert_close

#: alpha != r: a forgotten scaling shows.
SCALING = 2.5
NAMES = ("x", "weight", "bias", "A", "B", "B_bias")


def tensors(
    shape: tuple[int, ...] = (7, 24),
    out: int = 20,
    r: int = 4,
    *,
    dtype: torch.dtype = torch.float32,
    factor_dtype: torch.dtype | None = None,
    bias: bool = True,
    B_bias: bool = True,
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """The six tensors of a linear step, by name; all that exist require grad."""
    draw = torch.Generator().manual_seed(seed)
    factor_dtype = factor_dtype or dtype
    inside = shape[-1]

    def normal(*size: int, std: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*size, generator=draw) * std).to(dtype).requires_grad_()

    return {
        "x": normal(*shape),
        "weight": normal(out, inside, std=inside**-0.5),
        "bias": normal(out) if bias else None,
        "A": normal(r, inside, std=inside**-0.5, dtype=factor_dtype),
        "B": normal(out, r, std=r**-0.5, dtype=factor_dtype),
        "B_bias": normal(out, dtype=factor_dtype) if B_bias else None,
    }


def exact(given: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The same values in float64, as new leaves."""
    return {
        name: None if t is None else t.detach().double().requires_grad_(t.requires_grad)
        for name, t in given.items()
    }


def gradients(y: Tensor, given: dict[str, Tensor | None], seed: int = 1) -> dict[str, Tensor]:
    """Gradients of <y, noise> for everything that requires grad."""
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y)
    wanted = {name: t for name, t in given.items() if t is not None and t.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), noise), strict=True))


def second_derivatives(y: Tensor, given: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Gradients of a cubic in the gradients of a cubic in y; zeros for what it does not depend on."""
    wanted = {name: t for name, t in given.items() if t is not None and t.requires_grad}
    first = torch.autograd.grad(y.pow(3).sum(), list(wanted.values()), create_graph=True)
    second = torch.autograd.grad(
        sum(grad.pow(3).sum() for grad in first), list(wanted.values()), allow_unused=True
    )
    found = zip(wanted.items(), second, strict=True)
    return {name: torch.zeros_like(t) if grad is None else grad for (name, t), grad in found}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Equal names, and values equal within the dtype's tolerance, in units of the expected's own size."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        size = value.double().square().mean().sqrt().clamp_min(1e-30) if value.numel() else 1.0
        assert actual[name].shape == value.shape, name
        assert_close(actual[name].double() / size, value.double() / size, BY_DTYPE[dtype])


def keep_mask(x: Tensor, drop: Tensor) -> Tensor:
    """The keep mask, of x's shape, behind either form of a drawn dropout."""
    if drop.dtype == torch.bool:
        return drop.view(x.shape)
    mask = torch.ones(x.numel(), dtype=torch.bool)
    mask[drop.long()] = False
    return mask.view(x.shape)
