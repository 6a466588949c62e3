"""Matrices: `torch.nn.Linear`, and transformers' Conv1D, which stores its weight transposed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from veneer import backends, variants
from veneer.layers.base import LoraLayer
from veneer.layers.parts import Factor, stand_in
from veneer.ops import mixed_batch
from veneer.ops.lora_linear import add_lora_, autocasts, lora_linear
from veneer.routing import Routing, current

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_NO_PRODUCT = (
    "its class has a forward of its own that does not compute x Wᵀ + b: an update added to the weight would "
    "not do what the branch does. Keep the adapter unmerged"
)


def _is_plain(base: nn.Module) -> bool:
    """Whether ``base(x)`` is exactly ``x Wᵀ + b`` with the tensors that it holds.

    A subclass, a hook (offloaded weights have one), a parametrization or a tensor subclass may each compute
    something else, so those run their own forward.
    """
    return (
        type(base) is nn.Linear
        and type(base.weight) is nn.Parameter
        and "forward" not in base.__dict__
        and not (
            base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        )
    )


class LoraLinear(LoraLayer):
    """``y = x Wᵀ + b + s · dropout(x) Aᵀ Bᵀ``, with A (r, in) and B (out, r).

    Shapes: x: (..., in) -> (..., out).
    """

    wraps = ("torch.nn.modules.linear.Linear",)
    linear = True

    @classmethod
    def shapes(cls, base: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A (r, in), B (out, r)."""
        size_in, size_out = backends.find(base).features(base)
        return (r, size_in), (size_out, r)

    def low_rank(self, name: str, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        a, b = self.operators(name)
        return b(a(x))

    def refuses_merge(self, names: Sequence[str]) -> list[str]:
        """Besides the common reasons: a subclass whose forward is something else than ``x Wᵀ + b``."""
        return [*super().refuses_merge(names), *([] if self._multiplies(names) else [_NO_PRODUCT])]

    @torch.no_grad()
    def _multiplies(self, names: Sequence[str]) -> bool:
        """Whether a dense base's forward, given A for its weight, computes ``x Aᵀ``."""
        base = self.base_layer
        kind = f"{type(base).__module__}.{type(base).__qualname__}"
        if not names or type(base).forward is nn.Linear.forward or kind in self.wraps:
            return True
        if self.backend.quantization is not None:
            return True  # it has a forward of its own by nature
        weight = base.weight
        if self.transposed or type(weight) is not nn.Parameter or weight.dtype not in _FLOATS:
            return True
        a = self.factors(names[0])[0].detach()
        x = torch.linspace(-1.0, 1.0, 2 * a.shape[1], device=a.device, dtype=a.dtype).view(2, -1)
        given = type(base).forward(stand_in(base, {"weight": a, "bias": None}), x)
        return torch.allclose(given, x @ a.t(), rtol=1e-2, atol=1e-2 * float(a.abs().max()))

    def _has_plain_factors(self, name: str) -> bool:
        a, b = self.lora_A[name], self.lora_B[name]
        return Factor.is_plain(a) and Factor.is_plain(b)

    def add_branch(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        """``result + s · dropout(x) Aᵀ Bᵀ``; one step, no full-size temporary."""
        if not self._has_plain_factors(name) or autocasts(x.device.type):
            return super().add_branch(name, x, result)
        x = self.to_factors(name, x)
        a, b, bias = self.update_factors(name)
        if result.device != a.device:
            return super().add_branch(name, x, result)
        fresh = self._may_write()
        return add_lora_(result, x, a, b, bias, self.scaling[name], self.dropout_of(name), inplace=fresh)

    def _may_write(self) -> bool:
        """Whether nobody else holds the output of the base, nor will anybody ask for it again."""
        return (
            not torch.compiler.is_compiling()
            and len(self._live) == 1
            and current(self) is None
            and backends.gives_fresh_output(self.base_layer)
        )

    def add_rows(self, routing: Routing, names: tuple[str | None, ...], x: Tensor, result: Tensor) -> Tensor:
        """All adapters of the batch together, or row by row, whichever is faster.

        Only where an update is nothing but a product: no dropout, no bias, no other variant.
        """
        used = tuple(dict.fromkeys(name for name in names if name is not None))
        plain = (
            all(variants.get(self._specs[n].variant).additive and self.factors(n)[2] is None for n in used)
            and all(self._has_plain_factors(n) and self.dropout_of(n) == 0 for n in used)
            and all(self.factors(n)[0].device == x.device == result.device for n in used)
            and not autocasts(x.device.type)
            and _is_plain(self.original_base())
        )
        if not plain:
            return super().add_rows(routing, names, x, result)
        ranks = [0 if n is None else self.update_rank(n) for n in names]
        total, tokens = sum(self.update_rank(n) for n in used), x.numel() // x.shape[-1]
        runs = routing.runs(names)
        size = x.shape[-1] + result.shape[-1]
        count = sum(name is not None for name, _, _ in runs)
        if mixed_batch.prefers_mask(count, tokens, total, sum(ranks) / len(ranks), size):
            return mixed_batch.by_mask(x, result, *self._side_by_side(routing, names, used, x))
        terms = {n: (*self.update_factors(n)[:2], self.scaling[n]) for n in used}
        return mixed_batch.by_runs(x, result, terms, runs)

    def _side_by_side(
        self, routing: Routing, names: tuple[str | None, ...], used: tuple[str, ...], x: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Factors of all adapters, (R, in) and (out, R), and the strengths by row, (rows, R)."""
        key = (names, x.dtype)
        if not torch.is_grad_enabled() and (held := routing.memo.get(self, {}).get(key)):
            return held  # type: ignore[no-any-return]
        pairs = [self.update_factors(n) for n in used]
        a = torch.cat([a.to(x.dtype) for a, _, _ in pairs])
        b = torch.cat([b.to(x.dtype) for _, b, _ in pairs], dim=1)
        mask = routing.mask(names, tuple((n, self.update_rank(n), self.scaling[n]) for n in used), x)
        if not torch.is_grad_enabled():
            routing.memo.setdefault(self, {})[key] = (a, b, mask)
        return a, b, mask

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base and first branch in one step where the base is a plain linear; else base, then branches."""
        if (routing := current(self)) is not None:
            return self._forward_rows(routing, x, *args, **kwargs)
        live = self._live
        base: Any = self.base_layer
        if (
            not live
            or args
            or kwargs
            or not all(self._is_additive(name) for name in live[1:])
            or (not self._is_additive(live[0]) and self._merged)
            or not _is_plain(base)
            or x.dtype != base.weight.dtype
            or autocasts(x.device.type)
            or not self._has_plain_factors(live[0])
        ):
            return super().forward(x, *args, **kwargs)
        first, *rest = live
        if not self.factors(first)[0].device == x.device == base.weight.device:
            return super().forward(x)
        variant = variants.get(self._specs[first].variant)
        result = variant.whole(self, first, x, partial(self._together, first, x), base.bias)
        if result is None:
            return super().forward(x)
        for name in rest:
            result = self.add_branch(name, x, result)
        return result

    def _is_additive(self, name: str) -> bool:
        return variants.get(self._specs[name].variant).additive

    def _together(self, name: str, x: Tensor) -> Tensor:
        """``x Wᵀ + b + s · dropout(x) Aᵀ Bᵀ`` in one step, for a plain base."""
        base: Any = self.base_layer
        a, b, bias = self.update_factors(name)
        return lora_linear(
            x,
            base.weight,
            base.bias,
            a,
            b,
            bias,
            self.scaling[name],
            self.dropout_of(name),
        )


class LoraConv1D(LoraLinear):
    """transformers' Conv1D: a linear whose weight is stored (in, out).

    Shapes: x: (..., in) -> (..., out).
    """

    wraps = ("transformers.pytorch_utils.Conv1D",)
    transposed = True

    @classmethod
    def shapes(cls, base: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A (r, in), B (out, r), whatever the layout of the base."""
        size_in, size_out = base.weight.shape  # type: ignore[misc]
        return (r, size_in), (size_out, r)
