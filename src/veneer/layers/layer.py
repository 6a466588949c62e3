"""The one low-ranked layer, for every geometry.

A subclass says which module types it wraps, the shapes of its factors, how a matrix update lies in the base
weight, and how the branch is computed. Everything else is here and in what it is built on, once: `holder`
(what it holds), `merging`, `changing` (adapters come and go), and the forward below.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from veneer import backends, variants
from veneer.layers.changing import Changeable
from veneer.layers.refused import refusal
from veneer.ops.mixed_batch import along_rows, own_rows
from veneer.registry import TypeRegistry
from veneer.routing import Routing, acting, current
from veneer.sharded import gathered

registry: TypeRegistry[type[LoraLayer]] = TypeRegistry("layer")


def find(module: nn.Module) -> type[LoraLayer] | None:
    """The layer class that adapts such a module, or None.

    It is known by the module's type; that of a storage whose modules derive from no torch layer by the type
    that the storage names instead.
    """
    if refusal(module) is not None:
        return None
    found = registry.find(type(module))
    named = None if found is not None else backends.geometry(type(module))
    return found if named is None else registry.get(named)


class LoraLayer(Changeable):
    """A module with low-rank branches beside it: ``y = base(x) + Σ s·B(A(dropout(x)))``.

    The branches of the active adapters are added, except those that are merged into the base weight.
    `forward` never writes.

    Args:
        base_layer: The module to adapt, kept as it is under this name.
    """

    def __init_subclass__(cls) -> None:
        if "wraps" in cls.__dict__:  # others, such as FSDP2's, only dress a class up
            registry.add(cls.wraps, cls)

    # -- forward ---------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output plus the branches of the active adapters that are not merged."""
        if (routing := current(self)) is not None:
            return self._forward_rows(routing, x, *args, **kwargs)
        if self._disabled and self._merged:
            return self.original_base()(x, *args, **kwargs)  # type: ignore[no-any-return]
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if not self._live:
            return result
        base = partial(self._base_output, result, x, *args, **kwargs)
        for name in self._live:
            result = self.apply_adapter(name, x, result, base)
        return result

    def apply_adapter(self, name: str, x: Tensor, result: Tensor, base: Callable[[], Tensor]) -> Tensor:
        """``result`` and what one adapter adds to it.

        Args:
            name: The adapter.
            x: The layer's input, or some of its rows.
            result: The output so far, for the same rows; not written.
            base: Gives the output of the base alone for them.
        """
        return variants.get(self._specs[name].variant).forward(self, name, x, result, base)

    def _base_output(self, result: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the base alone: the present one's, unless adapters are merged into it."""
        return self.original_base()(x, *args, **kwargs) if self._merged else result

    def _forward_rows(self, routing: Routing, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output plus, for each row, the branch of the row's own adapter."""
        result: Tensor = self.original_base()(x, *args, **kwargs)
        if self._disabled or not self._specs or not routing.count:
            return result
        if torch.compiler.is_compiling():
            return self.add_slots(routing, x, result)
        if not routing.concerns(self._specs):
            return result
        names = routing.rows(x.shape[0] if x.dim() else 0, tuple(self._specs), self._where)
        return self.add_rows(routing, names, x, result)

    def _where(self) -> str:
        """What to call this layer in an error."""
        return next(iter(self._specs.values())).path or type(self).__name__

    def add_slots(self, routing: Routing, x: Tensor, result: Tensor) -> Tensor:
        """The same as `add_rows`, for a compiler: which row is whose is data, so it needs no other graph.

        Every row goes through every adapter that the layer holds.
        """
        base = result
        for name, mine in routing.slots(tuple(self._specs), x, self._where):
            before = own_rows(base, mine)
            own = self.apply_adapter(name, own_rows(x, mine), before, lambda before=before: before)  # type: ignore[misc]
            result = torch.where(along_rows(mine, result), own.to(result), result)
        return result

    def add_rows(self, routing: Routing, names: tuple[str | None, ...], x: Tensor, result: Tensor) -> Tensor:
        """``result`` with the branch of each row's own adapter added.

        Args:
            routing: Of the call that runs.
            names: The adapter of each row, None for none.
            x: (rows, ...) as the base takes it.
            result: (rows, ...), the base's output, fresh.
        """
        base = result
        for name, rows in routing.indices(names, x.device).items():
            if name is not None:
                there = rows.to(result.device)
                own = base[there]
                part = self.apply_adapter(name, x[rows], own, lambda own=own: own)  # type: ignore[misc]
                result = result.index_copy(0, there, part.to(result))
        return result

    def add_branch(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        """``result + s · B(A(dropout(x)))``, in the type of ``result``."""
        branch = self.low_rank(name, self.dropped(name, x))
        return result + (branch * self.strength(name)).to(result)

    def dropout_of(self, name: str) -> float:
        """The probability with which the branch drops elements of its input now; 0 in evaluation."""
        dropout: Any = self._modules["lora_dropout"]._modules[name]  # type: ignore[union-attr]
        return float(dropout.p) if dropout.training else 0.0

    def dropped(self, name: str, x: Tensor) -> Tensor:
        """``dropout(x)``, on the factors' device."""
        return self.lora_dropout[name](self.to_factors(name, x))  # type: ignore[no-any-return]

    def acting(self, name: str, x: Tensor) -> Tensor:
        """Where the call that runs lets an adapter act. x: (..., in) -> (...) of bool.

        Raises:
            RoutingError: The call does not say.
        """
        return acting(self, name, self._specs[name].path or type(self).__name__, x)

    def base_linear(self, x: Tensor) -> Tensor:
        """What the base alone gives for x, without its bias; nothing merged, no adapter."""
        return self.without_bias(self.original_base()(x))

    def without_bias(self, output: Tensor) -> Tensor:
        """An output of the base less the base's bias."""
        base = self.original_base()
        bias = getattr(base, "bias", None)
        if not isinstance(bias, Tensor):
            return output
        if bias.is_meta:
            bias = backends.find(base).read(base, "bias")
        return output - self.along_output(gathered(bias).to(output))

    def to_factors(self, name: str, x: Tensor) -> Tensor:
        """``x`` on the device of the factors: the two may differ in a model that is spread over devices."""
        device = self.factors(name)[0].device
        return x if device.type == "meta" else x.to(device)  # offloaded factors are fetched when called
