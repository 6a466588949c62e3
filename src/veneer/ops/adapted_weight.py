"""A weight with low-rank terms that are added to products, not to the weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

#: One term: ``s · lhs @ rhs`` with lhs (..., m, r) and rhs (..., r, n).
Term = tuple[Tensor, Tensor, float]

#: Grouped kernels need rows of a multiple of this many bytes.
_ALIGNMENT = 16


class AdaptedWeight:
    """``W + Σ s · L R`` for W (..., m, n), added up only where there is no cheaper way.

    A module reads it in place of its parameter. Taking an expert (``weight[i]``), transposing
    (``weight.transpose(-2, -1)``) and multiplying (`torch.nn.functional.linear`, ``@``, ``bmm``,
    ``grouped_mm``) compute ``x W + s · (x L) R``, without a tensor of the size of W. Any other operation
    computes the sum first.

    Args:
        weight: W.
        terms: The low-rank terms, in the type of W.
    """

    def __init__(self, weight: Tensor, terms: Sequence[Term]) -> None:
        self.weight = weight
        self.terms = tuple(terms)

    def dense(self) -> Tensor:
        """The sum."""
        total = self.weight
        for lhs, rhs, scale in self.terms:
            total = total + scale * (lhs @ rhs)
        return total

    def map(self, change: Callable[[Tensor], Tensor]) -> AdaptedWeight:
        return AdaptedWeight(change(self.weight), [(change(a), change(b), s) for a, b, s in self.terms])

    def transposed(self) -> AdaptedWeight:
        terms = [(b.transpose(-2, -1), a.transpose(-2, -1), s) for a, b, s in self.terms]
        return AdaptedWeight(self.weight.transpose(-2, -1), terms)

    def transpose(self, first: int, second: int) -> Any:
        """As `torch.Tensor.transpose`."""
        axes = {first % self.weight.dim(), second % self.weight.dim()}
        if axes == {self.weight.dim() - 2, self.weight.dim() - 1}:
            return self.transposed()
        return self.dense().transpose(first, second)

    def t(self) -> AdaptedWeight:
        return self.transposed()

    @property
    def T(self) -> AdaptedWeight:
        return self.transposed()

    @property
    def mT(self) -> AdaptedWeight:
        return self.transposed()

    def contiguous(self) -> AdaptedWeight:
        """Itself: products make their operands contiguous where necessary."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> AdaptedWeight:
        return self.map(lambda t: t.to(*args, **kwargs))

    def __getitem__(self, index: Any) -> Any:
        if self.weight.dim() > 2 and isinstance(index, int | slice | list | Tensor):
            return self.map(lambda t: t[index])
        return self.dense()[index]

    def __len__(self) -> int:
        return len(self.weight)

    def __matmul__(self, other: Tensor) -> Tensor:
        return _times_x(torch.matmul, self, other)

    def __rmatmul__(self, other: Tensor) -> Tensor:
        return _x_times(torch.matmul, other, self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in ("shape", "dtype", "device", "ndim", "dim", "size", "numel", "is_meta", "layout"):
            return getattr(self.weight, name)
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        product = _PRODUCTS.get(func)
        if product is not None and len(args) >= 2 and isinstance(args[0], cls) != isinstance(args[1], cls):
            if isinstance(args[1], cls):
                return product(func, *args, **kwargs)
            if product is _x_times and not args[2:] and not kwargs:
                return _times_x(func, *args)
        plain = [a.dense() if isinstance(a, cls) else a for a in args]
        return func(*plain, **{k: v.dense() if isinstance(v, cls) else v for k, v in kwargs.items()})


def _x_times(func: Callable[..., Any], x: Tensor, weight: AdaptedWeight) -> Tensor:
    """``x W + s (x L) R``."""
    result: Tensor = func(x, weight.weight)
    for lhs, rhs, scale in weight.terms:
        result = result + scale * func(func(x, lhs), rhs)
    return result


def _times_x(func: Callable[..., Any], weight: AdaptedWeight, x: Tensor) -> Tensor:
    """``W x + s L (R x)``."""
    result: Tensor = func(weight.weight, x)
    for lhs, rhs, scale in weight.terms:
        result = result + scale * func(lhs, func(rhs, x))
    return result


def _linear(func: Callable[..., Any], x: Tensor, weight: AdaptedWeight, bias: Tensor | None = None) -> Tensor:
    """``x Wᵀ + b + s (x Rᵀ) Lᵀ``."""
    result: Tensor = func(x, weight.weight, bias)
    for lhs, rhs, scale in weight.terms:
        result = result + scale * func(func(x, rhs), lhs)
    return result


def _grouped(func: Callable[..., Any], x: Tensor, weight: AdaptedWeight, **options: Any) -> Tensor:
    """Multiply each row of x with the matrix of its group."""
    result: Tensor = func(x, weight.weight, **options)
    for lhs, rhs, scale in weight.terms:
        step = max(_ALIGNMENT // lhs.element_size(), 1)
        missing = -lhs.shape[-1] % step  # the kernels need aligned rows; columns of zeros add nothing
        lhs = F.pad(lhs, (0, missing)).contiguous()
        rhs = F.pad(rhs, (0, 0, 0, missing)).contiguous()
        result = result + scale * func(func(x, lhs, **options), rhs, **options)
    return result


_PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    F.linear: _linear,
    **dict.fromkeys(
        (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__), _x_times
    ),
    **{
        func: _grouped
        for func in (getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None))
        if func is not None
    },
}
