"""Linear layers: `torch.nn.Linear`, and transformers' Conv1D, which stores its weight transposed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from veneer import backends
from veneer.layers.factor import RESIDUAL, Factor, stand_in
from veneer.layers.layer import LoraLayer
from veneer.ops import mixed_batch
from veneer.ops.dropout import Draws, wants_plain_torch
from veneer.ops.lora_linear import (
    add_lora_,
    few_rows,
    is_decoding_step,
    linear_of_few_rows,
    lora_linear,
)
from veneer.ops.lora_step import Factors, Part, add_lora_rows_, autocasts, lora_linear_rows
from veneer.ops.rows import scale_rows_, scaled
from veneer.routing import Routing, current, draws_of

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_NO_PRODUCT = (
    "its class has a forward of its own that does not compute x Wᵀ + b: an update added to the weight would "
    "not do what the branch does. Keep the adapter unmerged"
)


def _is_plain(base: nn.Module) -> bool:
    """Whether ``base(x)`` is exactly ``x Wᵀ + b`` with its own tensors.

    A subclass, a hook (offloaded weights have one, and some are for all modules), a parametrization or a
    tensor subclass may each compute something else, so those run their own forward.
    """
    return (
        type(base) is nn.Linear
        and type(base._parameters.get("weight")) is nn.Parameter
        and "forward" not in base.__dict__
        and not (
            base._forward_hooks
            or base._forward_pre_hooks
            or base._backward_hooks
            or base._backward_pre_hooks
            or _global_forward_hooks
            or _global_forward_pre_hooks
            or _global_backward_hooks
            or _global_backward_pre_hooks
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

    def may_fuse(self) -> bool:
        """The first variant may change the whole output; all others must be additive."""
        if self._disabled:
            return False
        if len(self._live) < 2 and not self._merged:
            return True
        alone = [name for name in self._live if not self.variant(name).additive]
        return not alone or (alone == [self._live[0]] and not self._merged)

    def fused_step(self, x: Tensor) -> Tensor | None:
        """Base and first branch in one step, then the other branches; None if the base is not plain.

        Without branches it is only the base's product, so a merged layer is as fast as its base.
        """
        base: Any = self._modules["base_layer"]
        if not _is_plain(base):
            return None
        weight, bias = base._parameters["weight"], base._parameters["bias"]
        if not self._live:
            return nn.functional.linear(x, weight, bias)
        first, *rest = self._live
        factors, p = self._plain_factors(first), self.dropout_of(first)
        if factors is None or x.dtype != weight.dtype:
            return None
        if not (rest or p) and self.variant(first).additive and is_decoding_step(x, weight, *factors[:2]):
            return linear_of_few_rows(x, weight, bias, *factors, self.scaling[first])
        if autocasts(x.device.type) or not factors[0].device == x.device == weight.device:
            return None
        if (scale := self._scale_of(first, p)) is None:
            return None
        result = lora_linear(x, weight, bias, *factors, self.strength(first), p)
        if isinstance(scale, Tensor):
            result = scaled(result, scale.to(result.device), bias)
        for name in rest:
            result = self.add_branch(name, x, result)
        return result

    def _scale_of(self, name: str, p: float) -> Tensor | float | None:
        """`Variant.output_scale` if the base sees one input: not that of what is scaled, with dropout."""
        variant = self.variant(name)
        return None if p and not variant.additive else variant.output_scale(self, name)

    def _plain_factors(self, name: str) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """`update_factors` if the factors can be read without calling their modules; else None."""
        modules = self._modules
        a, b = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]  # type: ignore[union-attr]
        if not (Factor.is_plain(a) and Factor.is_plain(b)):  # type: ignore[arg-type]
            return None
        # Past `nn.Module.__getattr__`, which takes as long as a small product.
        weight_a, weight_b = a._parameters.get("weight"), b._parameters.get("weight")  # type: ignore[union-attr]
        if weight_a is None or weight_b is None or RESIDUAL[0] in modules:
            return self.update_factors(name)
        return weight_a, weight_b, b._parameters.get("bias")  # type: ignore[union-attr]

    def add_branch(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        """``result + s · dropout(x) Aᵀ Bᵀ``; one step, no full-size temporary."""
        factors, p = self._plain_factors(name), self.dropout_of(name)
        own_draws = p > 0.0 and draws_of(name, x) is not None
        if factors is None or own_draws or autocasts(x.device.type):
            return super().add_branch(name, x, result)
        a, b, bias = factors
        x = self.to_factors(name, x)
        if result.device != a.device:
            return super().add_branch(name, x, result)
        return add_lora_(result, x, a, b, bias, self.strength(name), p, inplace=self._may_write())

    def _may_write(self) -> bool:
        """Whether nothing else uses the output of the base, now or later."""
        return (
            not torch.compiler.is_compiling()
            and len(self._live) == 1
            and current(self) is None
            and backends.gives_fresh_output(self.base_layer)
        )

    def mixed(self, routing: Routing, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """In training, the base and the branches that are plain products are one step for all rows."""
        if torch.is_grad_enabled() and not (args or kwargs):
            result = self._training_step(routing, x)
            if result is not None:
                return result
        return super().mixed(routing, x, *args, **kwargs)

    def _training_step(self, routing: Routing, x: Tensor) -> Tensor | None:
        """`mixed` with one product of the base for all rows; None if no adapter can take part in it."""
        # First: a compiler that saw the names would compile anew for each batch of them.
        if wants_plain_torch(x):
            return None
        if x.dtype == torch.float64 and autocasts(x.device.type):  # which autocast leaves as it is
            return None
        if self._disabled or not routing.concerns(self._specs) or x.dim() < 2:
            return None
        names = self.row_names(routing, x)
        steps = {name: self._step_of(name, routing, x) for name in dict.fromkeys(names) if name is not None}
        tokens = x[:1].numel() // x.shape[-1]
        parts: list[Part] = []
        factors: list[Factors] = []
        scales: list[tuple[slice, Tensor]] = []
        for name, start, stop in routing.layouts(names)[0].runs:
            step = None if name is None else steps[name]
            if step is not None:
                scaling, p, draws, scale, own = step
                parts.append(Part(scaling, p, slice(start * tokens, stop * tokens), draws))
                factors.append(own)
                if isinstance(scale, Tensor):
                    scales.append((slice(start, stop), scale))
        if not parts:
            return None
        result = self._rows_step(x, parts, factors)
        if scales:
            result = scale_rows_(result, scales, self.base_bias(result), inplace=True)
        others = tuple(None if name is None or steps[name] is not None else name for name in names)
        return super().add_rows(routing, others, x, result) if any(others) else result

    def _rows_step(self, x: Tensor, parts: Sequence[Part], factors: Sequence[Factors]) -> Tensor:
        base: Any = self.original_base()
        kind = x.device.type
        if autocasts(kind):
            result = base(x)
            x = x.to(torch.get_autocast_dtype(kind))
            with torch.autocast(kind, enabled=False):
                return add_lora_rows_(result, x, parts, factors, inplace=backends.gives_fresh_output(base))
        if _is_plain(base) and base.weight.dtype == x.dtype and base.weight.device == x.device:
            return lora_linear_rows(x, base.weight, base.bias, parts, factors)
        return add_lora_rows_(base(x), x, parts, factors, inplace=backends.gives_fresh_output(base))

    def _step_of(
        self, name: str, routing: Routing, x: Tensor
    ) -> tuple[float, float, Draws | None, Tensor | float, Factors] | None:
        """What a step over rows needs of an adapter; None if it takes more than a product and a scale."""
        factors, p = self._plain_factors(name), self.dropout_of(name)
        if factors is None or p == 1.0:
            return None
        if factors[0].device != x.device or wants_plain_torch(*factors[:2]):
            return None
        scale = self._scale_of(name, p)
        return None if scale is None else (self.scaling[name], p, routing.draws_for(name, x), scale, factors)

    def add_rows(self, routing: Routing, names: tuple[str | None, ...], x: Tensor, result: Tensor) -> Tensor:
        """Apply all adapters of the batch together if their updates are plain products.

        From the layer's second call on, the gathered or stacked factors are kept until the call of the model
        ends: `generate` calls the layer once for the prompt and once for each token.
        """
        kept = None if torch.is_grad_enabled() else routing.memo.get(self)
        key = (names, x.shape, x.dtype)
        function = None if kept is None else kept.get(key)
        if function is None:
            used = tuple(dict.fromkeys(name for name in names if name is not None))
            terms = self._products(used, x, result)
            if terms is None:
                return super().add_rows(routing, names, x, result)
            function = self._row_products(routing, names, terms, x)
            if kept is not None:
                kept[key] = function
            elif not torch.is_grad_enabled():
                routing.memo[self] = {}
        base: Any = self._modules["base_layer"]
        fresh = _is_plain(base) or backends.gives_fresh_output(base)
        return function(x, result, fresh=fresh)

    def _products(
        self, names: Sequence[str], x: Tensor, result: Tensor
    ) -> dict[str, mixed_batch.Term] | None:
        """Factors and strength by adapter, if each only adds ``s · (x Aᵀ) Bᵀ``; else None.

        That is not so with dropout, a bias, another variant, or factors on another device.
        """
        terms = {}
        for name in names:
            factors = self._plain_factors(name)
            if factors is None or not self.variant(name).additive or self.dropout_of(name):
                return None
            a, b, bias = factors
            if bias is not None or not a.device == x.device == result.device:
                return None
            terms[name] = (a, b, self.strength(name))
        return None if autocasts(x.device.type) else terms

    def _row_products(
        self,
        routing: Routing,
        names: tuple[str | None, ...],
        terms: dict[str, mixed_batch.Term],
        x: Tensor,
    ) -> Callable[..., Tensor]:
        """A function of x and the result that adds the rows' updates."""
        dtype = mixed_batch.working_dtype(x)
        few = few_rows(x) or x.numel() == x.shape[0] * x.shape[-1]
        size = mixed_batch.copied(x, terms.values())
        layout, chosen = mixed_batch.choose_layout(routing.layouts(names), few, size)
        function: Callable[..., Tensor]
        if chosen == "runs":
            function = partial(mixed_batch.by_runs, terms=terms, runs=layout.runs)
        else:
            a, b, scales = mixed_batch.stacked([terms.get(n) for n in layout.groups], dtype)  # type: ignore[arg-type]
            function = partial(mixed_batch.by_groups, a=a, b=b, scales=scales)
        order = None if layout.order is None else routing.order(layout.order, x.device)
        return partial(mixed_batch.on_gathered_rows, function=function, order=order)

    def add_slots(self, routing: Routing, x: Tensor, result: Tensor) -> Tensor:
        """Add the update of each row's adapter if the updates are plain products."""
        slots = list(routing.slots(tuple(self._specs), x, self._where))
        terms = self._products([name for name, _ in slots], x, result)
        if terms is None:
            return super().add_slots(routing, x, result)
        return mixed_batch.by_slots(x, result, [(*terms[name], mine) for name, mine in slots])

    def refuses_merge(self, names: Sequence[str]) -> list[str]:
        plain = type(self.base_layer).forward is nn.Linear.forward
        return [*super().refuses_merge(names), *([] if plain or self._multiplies(names) else [_NO_PRODUCT])]

    @torch.no_grad()
    def _multiplies(self, names: Sequence[str]) -> bool:
        """Whether a dense base's forward, with A in place of its weight, computes ``x Aᵀ``."""
        base = self.base_layer
        kind = f"{type(base).__module__}.{type(base).__qualname__}"
        if not names or kind in self.wraps:
            return True
        if self.backend.quantization is not None:
            return True  # its forward always differs from that of nn.Linear
        weight = base.weight
        if self.transposed or type(weight) is not nn.Parameter or weight.dtype not in _FLOATS:
            return True
        a = self.factors(names[0])[0].detach()
        x = torch.linspace(-1.0, 1.0, 2 * a.shape[1], device=a.device, dtype=a.dtype).view(2, -1)
        output = type(base).forward(stand_in(base, {"weight": a, "bias": None}), x)
        return torch.allclose(output, x @ a.t(), rtol=1e-2, atol=1e-2 * float(a.abs().max()))


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
