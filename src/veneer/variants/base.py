"""The interface of a variant: a way of combining ``W`` with its update."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from veneer.config import LoraConfig
from veneer.errors import ConfigError, Text
from veneer.registry import NameRegistry
from veneer.spec import LoraSpec

registry: NameRegistry[Variant] = NameRegistry("variant")


@dataclass(frozen=True)
class ParameterRequest:
    """The inputs from which a variant's own parameters of one layer are created.

    Attributes:
        spec: The settings of the adapter on this layer.
        vector_shape: Shape in which one number per output feature is stored: (out,), or (1, out, 1…) for a
            convolution.
        shape_a: Shape of A as stored.
        shape_b: Shape of B as stored.
        matrix: Returns the base weight as a matrix (out, in·k…), after the initialisation.
        update: Returns the initial update as B (out, r) and A (r, in·k…): ``W + s·B @ A``.
        generator: Returns a random generator that depends only on the adapter's seed and a parameter's name.
    """

    spec: LoraSpec
    vector_shape: tuple[int, ...]
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    matrix: Callable[[], Tensor]
    update: Callable[[], tuple[Tensor, Tensor]]
    generator: Callable[[str], torch.Generator]


class Branch(Protocol):
    """The layer as a variant sees it: see `veneer.layers.LoraLayer`.

    ``name`` is always the adapter's.
    """

    @property
    def training(self) -> bool: ...
    @property
    def scaling(self) -> Mapping[str, float]: ...
    @property
    def specs(self) -> Mapping[str, LoraSpec]: ...

    def strength(self, name: str) -> float: ...
    def low_rank(self, name: str, x: Tensor) -> Tensor: ...
    def add_branch(self, name: str, x: Tensor, result: Tensor) -> Tensor: ...
    def dropout_of(self, name: str) -> float: ...
    def dropped(self, name: str, x: Tensor) -> Tensor: ...
    def base_linear(self, x: Tensor) -> Tensor: ...
    def without_bias(self, output: Tensor) -> Tensor: ...
    def along_output(self, vector: Tensor) -> Tensor: ...
    def acting(self, name: str, x: Tensor) -> Tensor: ...
    def matrix(self) -> Tensor: ...
    def weight_state(self) -> object: ...
    def update(self, name: str) -> tuple[Tensor, Tensor]: ...
    def extra(self, name: str) -> Mapping[str, Tensor]: ...


class Variant(abc.ABC):
    """One way of combining the base weight with a low-rank update.

    Defining a subclass registers it under its `name`. The parameters that it declares are initialised, stored
    in the layer, trained, saved, loaded, copied, renamed and merged together with the factors.
    """

    name: ClassVar[str] = ""
    #: Whether the update is simply added; merging, combining and the fused step rely on it.
    additive: ClassVar[bool] = False
    #: Whether it reads the base weight, which some storages cannot return. An additive one never does.
    reads_weight: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        registry.add(cls.name, cls())

    def options(self, config: LoraConfig) -> Mapping[str, Any]:
        """The options of the configuration that this variant needs; kept in ``spec.variant_options``.

        A plug-in finds its own options in ``config.variant_options``; refuse wrong ones with a `ConfigError`.
        """
        return config.variant_options

    def refuses(self, spec: LoraSpec, layer_type: str) -> str | Text | None:
        """Why this variant cannot be used with these settings on that type of layer, or None."""
        return None

    def refuses_merge(self, spec: LoraSpec) -> str | None:
        """Why the adapter cannot be merged into a weight, or None."""
        return None

    def shapes(self, request: ParameterRequest) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the parameters that an adapter has besides A and B, by name.

        A name begins with ``lora_``. In memory the parameter is called
        ``<layer>.<name>.<adapter>.weight``, on disk ``<layer>.<name>``. The tensors of the request must not
        be read here: a model may be on the meta device.
        """
        return {}

    def parameters(self, request: ParameterRequest) -> Mapping[str, Tensor]:
        """Initial values of the parameters of `shapes`, computed without side effects."""
        return {}

    @functools.cached_property
    def has_parameters(self) -> bool:
        """Whether it declares parameters of its own."""
        kind = type(self)
        return kind.shapes is not Variant.shapes or kind.parameters is not Variant.parameters

    @abc.abstractmethod
    def forward(
        self, layer: Branch, name: str, x: Tensor, result: Tensor, base: Callable[[], Tensor]
    ) -> Tensor:
        """``result`` plus the contribution of the adapter ``name``, computed without side effects.

        Contributions add up: each depends on the base and its adapter alone, so the order of adapters does
        not matter and any of them may be merged.

        Args:
            layer: The layer.
            name: The adapter.
            x: The layer's input.
            result: The base's output, plus the contributions of previous adapters.
            base: Returns the output of the base alone for x.
        """

    def output_scale(self, layer: Branch, name: str) -> Tensor | float | None:
        """c, if `forward` is ``W x + b + (c − 1) W x̃ + c s·BA x̃`` with x̃ = dropout(x); else None.

        c is 1 for an additive variant, or has one number for each output feature and the shape to multiply
        an output. A layer that knows it computes base and branch in one step, also for many adapters' rows.
        """
        return 1.0 if self.additive else None

    @abc.abstractmethod
    def merged(self, weight: Tensor, delta: Tensor, extra: Mapping[str, Tensor]) -> Tensor:
        """The weight with which the base alone computes `forward`, without side effects.

        Args:
            weight: The base weight as a dense matrix (out, in·k…), without any adapter.
            delta: The scaled update, of the same shape.
            extra: The variant's own parameters of this adapter, as stored.
        """


def scaled_branch(layer: Branch, name: str, dropped: Tensor, plain: Tensor, scale: Tensor) -> Tensor:
    """``(c − 1) W x̃ + c s·BA x̃``, what an adapter with an `output_scale` c adds to the base.

    Args:
        layer: The layer.
        name: The adapter.
        dropped: x̃, the dropped input.
        plain: ``W x̃``.
        scale: c.
    """
    both = plain + layer.low_rank(name, dropped).to(plain) * layer.strength(name)
    return both * scale.to(both.device) - plain


def get(name: str) -> Variant:
    """The variant of that name.

    Raises:
        ConfigError: If it does not exist.
    """
    variant = registry.get(name)
    if variant is None:
        raise ConfigError(
            f"the configuration asks for the variant {name!r}, which this version of Veneer does not have; "
            f"it has: {', '.join(registry.names())}"
        )
    return variant
