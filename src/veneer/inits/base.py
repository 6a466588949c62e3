"""What an initialisation is: a pure function from a request to the two factors."""

from __future__ import annotations

import abc
import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from veneer.config import PLUGIN_INITS
from veneer.errors import ConfigError, Hint, Text
from veneer.registry import load_plugins
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
        stats: What was measured on data for this layer (see `note_statistics`), or None.
    """

    spec: LoraSpec
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    bias: bool
    lookup: bool
    matrix: Callable[[], Tensor]
    seed: int
    stats: Any = None

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
        residual: ``(A₀, B₀)``, frozen: the update is ``s·(BA − B₀A₀)``; None where it is ``s·BA``.
        fresh: Nobody else holds A, B and the bias, so a layer may keep these very tensors instead of copies.
        unmeasured: It is the default start, and stands in until what was asked for is measured.
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None = None
    base: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    residual: tuple[Tensor, Tensor] | None = None
    fresh: bool = False
    unmeasured: bool = False

    def update(self) -> tuple[Tensor, Tensor]:
        """Factors whose product is the whole update, unscaled."""
        return (self.a, self.b) if self.residual is None else folded(self.a, self.b, self.residual)


def folded(a: Tensor, b: Tensor, residual: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """``BA − B₀A₀`` as one product of twice the rank: ``[B − B₀, B₀] [A; A − A₀]``.

    Zero at the start bit for bit, and precise after it in any type: the small differences are taken before
    anything is multiplied or rounded. Differentiable by A and B.

    Args:
        a: A (r, in, k…).
        b: B (out, r, 1…).
        residual: ``(A₀, B₀)`` of the same shapes.
    """
    a0, b0 = residual
    return torch.cat([a, a - a0]), torch.cat([b - b0, b0], dim=1)


class Init(abc.ABC):
    """One initialisation. Defining a subclass registers it."""

    #: The values of ``init_lora_weights`` that ask for it.
    names: ClassVar[tuple[bool | str, ...]] = ()
    #: Whether the adapted model equals the base model until trained.
    identity: ClassVar[bool] = True
    #: Whether that holds bit for bit; otherwise up to rounding.
    exact: ClassVar[bool] = True
    #: Whether it gives the base another weight: for every adapter beside it, and for good.
    replaces_base: ClassVar[bool] = False
    #: Whether its start, which is not zero, is taken off the update: ``s·(BA − B₀A₀)``. The method as
    #: published takes it off the base weight instead, which would change the base for other adapters.
    subtracts_start: ClassVar[bool] = False
    #: Whether it starts from the inputs of the layer, which must be numbers then.
    measures_inputs: ClassVar[bool] = False
    #: How to measure what it needs to know from data, or "" if it needs nothing.
    measured_by: ClassVar[str] = ""
    #: Whether that is done once the adapter is in place, which starts as by default until then.
    measured_in_place: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        if taken := [n for init in _inits for n in init.names if n in cls.names]:
            raise ValueError(
                f"the initialisation {taken[0]!r} is registered twice, the second time by {cls!r}"
            )
        _inits.append(cls())
        _claiming.cache_clear()
        for name in cls.names:
            if isinstance(name, str):
                PLUGIN_INITS.setdefault(name.lower(), cls.replaces_base or cls.subtracts_start)

    def claims(self, value: bool | str) -> bool:
        """Whether this value of ``init_lora_weights`` asks for this initialisation."""
        return any(value is name or (isinstance(name, str) and value == name) for name in self.names)

    def refuses(self, spec: LoraSpec, layer_type: str, as_matrix: bool) -> str | Text | None:
        """Why it cannot start such a layer, or None.

        Args:
            spec: What the module would get.
            layer_type: Name of the base layer's type.
            as_matrix: Whether the layer's update is one matrix product ``B @ A``.
        """
        return None

    def lacks(self, stats: Any) -> bool:
        """Whether it cannot start without what `measured_by` gives."""
        return bool(self.measured_by) and not self.measured_in_place and stats is None

    @abc.abstractmethod
    def __call__(self, request: InitRequest) -> InitResult:
        """Compute the factors; reads nothing but the request, and writes nothing."""


def find(value: bool | str) -> Init:
    """The initialisation that ``init_lora_weights=value`` asks for.

    Raises:
        ConfigError: If there is none.
    """
    load_plugins()
    if (found := _claiming(value)) is not None:
        return found
    known = ", ".join(repr(name) for init in _inits for name in init.names)
    raise ConfigError(
        Hint("init_lora_weights", value),
        f" is not an initialisation of this version of Veneer or of an imported plug-in; there are: {known}",
    )


@functools.lru_cache(maxsize=64, typed=True)
def _claiming(value: bool | str) -> Init | None:
    return next((init for init in _inits if init.claims(value)), None)


def inits() -> tuple[Init, ...]:
    """All registered initialisations."""
    load_plugins()
    return tuple(_inits)


_statistics: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()


def note_statistics(module: nn.Module, stats: Any, weight: str = "weight") -> None:
    """Keep what was measured for a base module until an adapter that starts from it is in place.

    It is kept beside the module, not on it: neither a copy nor a pickle of the model carries it.
    """
    _statistics.setdefault(module, {})[weight] = stats


def statistics_of(module: nn.Module, weight: str = "weight") -> Any:
    """What was measured for a weight of a base module, or None."""
    return _statistics.get(module, {}).get(weight)


def forget_statistics(module: nn.Module) -> None:
    """Drop what was measured for a base module."""
    _statistics.pop(module, None)


def kaiming(request: InitRequest, parameter: str, shape: tuple[int, ...]) -> Tensor:
    """Kaiming-uniform with a = √5.

    That is U(−1/√fan_in, 1/√fan_in) with fan_in = in·k….
    """
    bound = 1.0 / math.sqrt(max(1, math.prod(shape[1:])))
    return torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=request.generator(parameter))


def normal(request: InitRequest, parameter: str, shape: tuple[int, ...], std: float = 1.0) -> Tensor:
    """N(0, std²)."""
    return torch.empty(shape, device="cpu").normal_(0.0, std, generator=request.generator(parameter))


def zero_bias(request: InitRequest) -> Tensor | None:
    """A bias of B that is zero, where B has one."""
    return torch.zeros(request.shape_b[0], device="cpu") if request.bias else None


def filled(request: InitRequest, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of fewer than r rows and columns, in the shapes asked for; ``B @ A`` stays what it is.

    Where a matrix has fewer directions than the rank, the rest of one factor is zero and that of the other
    random, so that it can learn.

    Args:
        request: What was asked for.
        a: (k, in·k…), k ≤ r.
        b: (out, k).
    """
    missing = request.spec.r - a.shape[0]
    if missing > 0:
        rows, columns = (missing, a.shape[1]), (b.shape[0], missing)
        if request.lookup:
            more_a, more_b = torch.zeros(rows), normal(request, "lora_embedding_B", columns)
        else:
            more_a, more_b = kaiming(request, "lora_A", rows), torch.zeros(columns)
        a, b = torch.cat([a, more_a.to(a)]), torch.cat([b, more_b.to(b)], dim=1)
    return a.reshape(request.shape_a).contiguous(), b.reshape(request.shape_b).contiguous()


def subtracted(request: InitRequest, a: Tensor, b: Tensor) -> InitResult:
    """The start (a, b), and the same as the term that is taken off the update."""
    a, b = filled(request, a, b)
    return InitResult(a, b, residual=(a, b))


def not_one_matrix(what: str, layer_type: str) -> str:
    """Why an initialisation that factorises a matrix cannot start a layer without one."""
    return f"{what} needs one matrix, and the update of this {layer_type} is none (groups, or a stack)"
