"""What a way of combining ``W`` and its update must answer."""

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
    """What a variant may look at when its own parameters of one layer are made.

    Attributes:
        spec: What this layer gets from this adapter.
        vector_shape: How one number for each output feature is stored: (out,), or (1, out, 1…) beside a
            convolution.
        shape_a: Shape of A as stored.
        shape_b: Shape of B as stored.
        matrix: Gives the base weight as a matrix (out, in·k…), as it is beside the starting factors.
        update: Gives the starting update as B (out, r) and A (r, in·k…): ``W + s·B @ A``.
        generator: Gives a random generator that depends on the adapter's draw and a parameter's name only.
    """

    spec: LoraSpec
    vector_shape: tuple[int, ...]
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    matrix: Callable[[], Tensor]
    update: Callable[[], tuple[Tensor, Tensor]]
    generator: Callable[[str], torch.Generator]


class Branch(Protocol):
    """What a variant sees of the layer that it works in: see `veneer.layers.LoraLayer`.

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

    Defining a subclass registers it under its `name`. That is all: the parameters that it asks for are
    initialised, stored in the layer, trained, saved, loaded, copied, renamed and merged with the factors.
    """

    name: ClassVar[str] = ""
    #: The update is simply added: merging, combining and the fused step may rely on it.
    additive: ClassVar[bool] = False
    #: It asks for the base weight itself, which some storages do not give. An additive one never does.
    reads_weight: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        registry.add(cls.name, cls())

    def options(self, config: LoraConfig) -> Mapping[str, Any]:
        """What this variant needs of the configuration at run time; kept in ``spec.variant_options``.

        A plug-in's own options come in ``config.variant_options``; refuse wrong ones with a `ConfigError`.
        """
        return config.variant_options

    def refuses(self, spec: LoraSpec, layer_type: str) -> str | Text | None:
        """Why this variant cannot serve the spec on that type of layer, or None."""
        return None

    def refuses_merge(self, spec: LoraSpec) -> str | None:
        """Why no weight computes what the adapter does, or None where one does."""
        return None

    def shapes(self, request: ParameterRequest) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the parameters that an adapter has beside A and B, by their names.

        A name begins with ``lora_``. In memory such a parameter is called
        ``<layer>.<name>.<adapter>.weight``, on disk ``<layer>.<name>``. Tensors of the request may not be
        asked for here: a model can be without values.
        """
        return {}

    def parameters(self, request: ParameterRequest) -> Mapping[str, Tensor]:
        """Where the parameters of `shapes` start; it writes nothing."""
        return {}

    @functools.cached_property
    def has_parameters(self) -> bool:
        """Whether it says anything of parameters of its own: most do not, and are not asked."""
        kind = type(self)
        return kind.shapes is not Variant.shapes or kind.parameters is not Variant.parameters

    @abc.abstractmethod
    def forward(
        self, layer: Branch, name: str, x: Tensor, result: Tensor, base: Callable[[], Tensor]
    ) -> Tensor:
        """``result`` and what the adapter ``name`` adds to it. It writes nothing.

        Adapters add up: what one adds depends on the base and on itself, never on the others, so that their
        order does not matter and any of them may be merged.

        Args:
            layer: The layer.
            name: The adapter.
            x: The layer's input.
            result: The base's output, plus what the adapters before have added.
            base: Gives the output of the base alone for x.
        """

    def whole(
        self, layer: Branch, name: str, x: Tensor, together: Callable[[], Tensor], bias: Tensor | None
    ) -> Tensor | None:
        """The same for a layer that can compute base and branch in one step; None where that is no help.

        Args:
            layer: The layer.
            name: The adapter, the first to be applied.
            x: The layer's input.
            together: Gives ``W x + b + s·B(A(dropout(x)))``.
            bias: The base's bias b, or None.
        """
        return None

    @abc.abstractmethod
    def merged(self, weight: Tensor, delta: Tensor, extra: Mapping[str, Tensor]) -> Tensor:
        """The weight with which the base alone computes what `forward` does. It writes nothing.

        Args:
            weight: The base weight as a dense matrix (out, in·k…), without any adapter.
            delta: The scaled update, of the same shape.
            extra: The variant's own parameters of this adapter, as stored.
        """


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
