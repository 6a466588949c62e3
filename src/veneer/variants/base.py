"""What a way of combining ``W`` and its update must answer."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import ClassVar, Protocol

from torch import Tensor

from veneer.errors import ConfigError
from veneer.registry import NameRegistry
from veneer.spec import LoraSpec

registry: NameRegistry[Variant] = NameRegistry("variant")


class Branch(Protocol):
    """What a variant sees of the layer that it works in."""

    def add_branch(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        """``result + s · low_rank(dropout(x))`` for the adapter ``name``."""
        ...


class Variant(abc.ABC):
    """One way of combining the base weight with a low-rank update.

    Defining a subclass registers it under its `name`.
    """

    name: ClassVar[str] = ""
    #: The update is simply added: merging, combining and the fused step may rely on it.
    additive: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        registry.add(cls.name, cls())

    def refuses(self, spec: LoraSpec, layer_type: str) -> str | None:
        """Why this variant cannot serve the spec on that type of layer, or None."""
        return None

    @abc.abstractmethod
    def forward(self, layer: Branch, name: str, x: Tensor, result: Tensor) -> Tensor:
        """The layer's output with the adapter ``name`` applied.

        Args:
            layer: The layer, which computes its own low-rank branch.
            name: The adapter.
            x: The layer's input.
            result: Its output so far: the base's, plus the adapters applied before. Fresh; it may be
                written.
        """

    @abc.abstractmethod
    def merged(self, weight: Tensor, delta: Tensor, extra: Mapping[str, Tensor]) -> Tensor:
        """The weight with the update applied.

        Args:
            weight: Dense base weight, in the layout of the base layer.
            delta: The scaled update, in the same layout.
            extra: The variant's own parameters of this adapter.
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
