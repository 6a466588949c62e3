"""What an initialisation is: a pure function from a request to the two factors."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from veneer.errors import ConfigError
from veneer.spec import LoraSpec

_inits: list[Init] = []


@dataclass(frozen=True)
class InitRequest:
    """What an initialisation may look at.

    Attributes:
        spec: What this module gets from this adapter.
        shape_a: Shape of A as stored: (r, in) or (r, in, k…).
        shape_b: Shape of B as stored: (out, r) or (out, r, 1…).
        bias: Whether B has a bias.
        lookup: True where the layer looks rows up instead of multiplying (an embedding).
        matrix: Gives the base weight as a matrix (out, in·k…), in which the update is ``B @ A``.
        seed: Number that the adapter drew; combined with the parameter's name for each generator.
    """

    spec: LoraSpec
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    bias: bool
    lookup: bool
    matrix: Callable[[], Tensor]
    seed: int

    def generator(self, parameter: str) -> torch.Generator:
        """A generator that depends on the adapter's draw and on the parameter's full name only.

        So neither the order of modules nor the way a model is sharded changes a value.
        """
        key = f"{self.seed}:{self.spec.path}.{parameter}".encode()
        digest = hashlib.blake2b(key, digest_size=8).digest()
        generator = torch.Generator()
        generator.manual_seed(int.from_bytes(digest, "little") >> 1)
        return generator


@dataclass(frozen=True)
class InitResult:
    """The factors, in float32 on the CPU unless the initialisation works elsewhere.

    Attributes:
        a: A, of the requested shape.
        b: B, of the requested shape.
        bias: Bias of B (out,), or None.
        base: A replacement (out, in·k…) for the base weight, for the initialisations that by nature
            replace it; None leaves the base exact.
        extra: What the variant has beside the factors; the layer asks it, an initialisation leaves it empty.
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None = None
    base: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)


class Init(abc.ABC):
    """One initialisation. Defining a subclass registers it."""

    #: The values of ``init_lora_weights`` that ask for it.
    names: ClassVar[tuple[bool | str, ...]] = ()
    #: Whether the adapted model equals the base model until trained.
    identity: ClassVar[bool] = True
    #: Whether it gives the base another weight: for every adapter beside it, and for good.
    replaces_base: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        _inits.append(cls())

    def claims(self, value: bool | str) -> bool:
        """Whether this value of ``init_lora_weights`` asks for this initialisation."""
        return any(value is name or (isinstance(name, str) and value == name) for name in self.names)

    def refuses(self, spec: LoraSpec, layer_type: str, as_matrix: bool) -> str | None:
        """Why it cannot start such a layer, or None.

        Args:
            spec: What the module would get.
            layer_type: Name of the base layer's type.
            as_matrix: Whether the layer's update is one matrix product ``B @ A``.
        """
        return None

    @abc.abstractmethod
    def __call__(self, request: InitRequest) -> InitResult:
        """Compute the factors; reads nothing but the request, and writes nothing."""


def find(value: bool | str) -> Init:
    """The initialisation that ``init_lora_weights=value`` asks for.

    Raises:
        ConfigError: If there is none.
    """
    for init in _inits:
        if init.claims(value):
            return init
    known = ", ".join(repr(name) for init in _inits for name in init.names)
    raise ConfigError(
        f"init_lora_weights={value!r} is not an initialisation of this version of Veneer; it has: {known}"
    )


def inits() -> tuple[Init, ...]:
    """All registered initialisations."""
    return tuple(_inits)
