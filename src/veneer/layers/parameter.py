"""Bare parameters: a tensor that a module holds and uses by itself, such as a stack of experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer import backends
from veneer.errors import Hint, Text
from veneer.layers.by_adapter import by_adapter
from veneer.layers.factor import stand_in
from veneer.layers.layer import LoraLayer
from veneer.ops.adapted_weight import AdaptedWeight, Term
from veneer.routing import call_by_rows, current
from veneer.spec import LoraSpec

#: Attributes of transformers' experts. They are called with tokens, and the indices and weights of the
#: experts that were chosen for each.
_EXPERTS = {"has_gate", "has_bias", "is_transposed"}


class LoraParameter(LoraLayer):
    """LoRA on a parameter P of a module, which computes with ``P + s · Δ``.

    A matrix (out, in) gets ``Δ = B A``. A stack of E matrices gets a pair of rank r for each, kept together:
    A (r·E, in) and B (out, r·E), with ``Δ[e] = B[:, :, e] A[e]`` of B as (out, r, E) and A as (E, r, in). The
    stack is stored as (E, out, in), or as (E, in, out) if the module has ``is_transposed``.

    The module's own forward runs on a copy with an `AdaptedWeight` in place of P: products are computed with
    the factors, and Δ is only formed for other operations. Under `torch.compile` the sum is formed, and fused
    by the compiler.

    Several parameters of one module are wrapped one inside the other, in the order in which the module
    registered them; the outermost runs the module.

    Args:
        base_layer: The module, or the `LoraParameter` of an earlier parameter of it.
        parameter_name: The parameter's name on the module.
    """

    takes_rows = False

    transparent = True

    def __init__(self, base_layer: nn.Module, parameter_name: str) -> None:
        super().__init__(base_layer)
        self.weight_name = self.parameter_name = parameter_name

    def chain(self) -> Iterator[LoraParameter]:
        """This layer and those inside it."""
        layer: nn.Module = self
        while isinstance(layer, LoraParameter):
            yield layer
            layer = layer.base_layer

    def get_base_layer(self) -> nn.Module:
        return list(self.chain())[-1].base_layer

    # -- geometry ------------------------------------------------------------------------------------

    def _sizes(self) -> tuple[int, int, int]:
        """Number of matrices, in and out."""
        shape = getattr(self.get_base_layer(), self.weight_name).shape
        if len(shape) == 2:
            return 1, shape[1], shape[0]
        count, rows, columns = shape
        return (count, rows, columns) if self._is_transposed() else (count, columns, rows)

    def _is_transposed(self) -> bool:
        return bool(getattr(self.get_base_layer(), "is_transposed", False))

    def shapes(  # type: ignore[override]
        self, base: nn.Module, r: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A (r·E, in), B (out, r·E)."""
        count, size_in, size_out = self._sizes()
        return (r * count, size_in), (size_out, r * count)

    def refuses(self, base: nn.Module, spec: LoraSpec) -> str | Text | None:  # type: ignore[override]
        """Refuses what needs the input of a product or a single matrix."""
        tensor = getattr(base, self.weight_name)
        if tensor.dim() not in (2, 3):
            return (
                f"{self.weight_name} has {tensor.dim()} dimensions; a matrix or a stack of matrices is needed"
            )
        if not tensor.is_floating_point():
            return f"{self.weight_name} is of type {tensor.dtype}: only floating-point parameters are adapted"
        if (storage := backends.find(base, self.weight_name).quantization) is not None:
            return (
                f"{self.weight_name} is quantised by {storage}, and a bare parameter is adapted beside dense "
                "values only: leave it out, or dense"
            )
        if spec.lora_dropout:
            return Text(
                Hint("lora_dropout"),
                " drops elements of the input of a product, and a bare parameter meets its input inside the "
                "module's own forward: set ",
                Hint("lora_dropout", 0),
            )
        if spec.lora_bias:
            return "lora_bias has no place: a bare parameter has no bias"
        if spec.variant != "plain":
            return f"the variant {spec.variant!r} needs the output of a layer; a bare parameter has none"
        return None

    def is_matrix(self) -> bool:
        return getattr(self.get_base_layer(), self.weight_name).dim() == 2  # type: ignore[no-any-return]

    def refuses_combination(self) -> str | None:
        """The factors of a stack are interleaved."""
        if self.is_matrix():
            return None
        return (
            "adapters of a stack of matrices (target_parameters) cannot be combined; activate them together"
        )

    def term(self, name: str) -> Term:
        """``Δ`` of an adapter as (left, right, s), in the layout of the parameter."""
        a, b, _ = self.update_factors(name)
        return (*self._sides(a, b), self.scaling[name])

    def _sides(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Two factors of Δ in the layout of the parameter."""
        count, size_in, size_out = self._sizes()
        if self.is_matrix():
            return b, a
        left = b.view(size_out, -1, count).permute(2, 0, 1)
        right = a.view(count, -1, size_in)
        if self._is_transposed():
            left, right = right.transpose(-2, -1), left.transpose(-2, -1)
        return left, right

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(0, -2)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        left, right = self._sides(a, b)
        return self.to_matrix(left @ right)

    # -- forward -------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module with the adapted parameters of all layers of the chain.

        In a mixed batch it is called once for each adapter, with the rows that are the adapter's.
        """
        if "adapter_names" in kwargs:
            return call_by_rows(self, kwargs.pop("adapter_names"), *args, **kwargs)
        routing = current(self)
        if routing is None:
            return self._with(None)(*args, **kwargs)
        enabled = [layer for layer in self.chain() if not layer._disabled]
        held = tuple(dict.fromkeys(name for layer in enabled for name in layer.held_adapters))
        chosen = self._of_an_expert() or not all(layer.is_matrix() for layer in enabled)
        by_token = self.get_base_layer().__dict__.keys() >= _EXPERTS
        options = {"chosen": chosen, "by_token": by_token}
        return by_adapter(routing, held, self._where(), self._of, args, kwargs, **options)

    def _of(self, name: str | None) -> nn.Module:
        return self._with(() if name is None else (name,))

    def _with(self, names: tuple[str, ...] | None) -> nn.Module:
        """The module with the parameters of these adapters; None for the active ones."""
        base = self.get_base_layer()
        weights = {layer.weight_name: layer._adapted_weight(names) for layer in self.chain()}
        adapted = {name: weight for name, weight in weights.items() if weight is not None}
        if not adapted:
            return base
        # The copy has no hook that would fetch other offloaded parameters.
        offloaded = {n: _fetched(base, n) for n, p in base._parameters.items() if p is not None and p.is_meta}
        return stand_in(base, {**offloaded, **adapted})  # type: ignore[dict-item]

    def _adapted_weight(self, names: tuple[str, ...] | None) -> Tensor | AdaptedWeight | None:
        """What replaces the parameter for these adapters, None for the active ones; None for the module's."""
        if self._disabled or names == ():
            return self.original_base()._parameters[self.weight_name] if self._merged else None
        live = self._live if names is None else [name for name in names if name in self._specs]
        if not live:
            return None
        weight = _fetched(self.get_base_layer(), self.weight_name)
        terms = [(a.to(weight), b.to(weight), s) for a, b, s in map(self.term, live)]
        adapted = AdaptedWeight(weight, terms)
        return adapted.dense() if torch.compiler.is_compiling() else adapted

    def low_rank(self, name: str, x: Tensor) -> Tensor:
        raise NotImplementedError("a bare parameter is adapted inside its module's forward")

    def extra_repr(self) -> str:
        return f"parameter_name={self.parameter_name!r}"


def _fetched(module: nn.Module, name: str) -> Tensor:
    """A parameter of a module, fetched if it is offloaded."""
    tensor: Tensor = getattr(module, name)
    if not tensor.is_meta:
        return tensor
    backend = backends.find(module, name)
    return backend.read(module, name).to(backend.tensor_device(module, name))


def parameters_of(module: nn.Module) -> dict[str, LoraParameter]:
    """The layers of a wrapped module's adapted parameters, by parameter name, innermost first."""
    chain = list(module.chain()) if isinstance(module, LoraParameter) else []
    return {layer.weight_name: layer for layer in reversed(chain)}


def why_not_wrapped(module: nn.Module, names: Sequence[str]) -> str | None:
    """Why these parameters cannot be adapted together with the module's present adapters, or None."""
    if isinstance(module, LoraLayer) and not isinstance(module, LoraParameter):
        return (
            f"the module that holds it is adapted itself ({type(module).__name__}): name the module or its "
            "parameter, not both"
        )
    present = set(parameters_of(module))
    if present and present != set(names):
        return (
            f"other adapters adapt {', '.join(sorted(present))} of this module, and the names in an "
            "adapter's file depend on which parameters of a module are adapted: name the same ones"
        )
    return None
