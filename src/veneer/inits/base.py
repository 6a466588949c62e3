"""An initialisation: a pure function from a request to the two factors."""

from __future__ import annotations

import abc
import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.config import PLUGIN_INITS
from veneer.errors import ConfigError, Hint, Text
from veneer.registry import load_plugins
from veneer.spec import LoraSpec

_inits: list[Init] = []


@dataclass(frozen=True)
class InitRequest:
    """The inputs of an initialisation.

    Attributes:
        spec: The settings of the adapter on this module.
        shape_a: Shape of A as stored: (r, in) or (r, in, k…).
        shape_b: Shape of B as stored: (out, r) or (out, r, 1…).
        bias: Whether B has a bias.
        lookup: Whether the layer looks rows up instead of multiplying (an embedding).
        matrix: Returns the base weight as a matrix (out, in·k…), to which the update ``B @ A`` is added.
        seed: The adapter's random number; each generator combines it with a parameter's name.
        stats: Statistics measured on data for this layer (see `note_statistics`), or None.
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
        """A random generator that depends only on the seed and the parameter's full name.

        So the values do not depend on the order of modules, or on how a model is sharded.
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
        base: A new base weight (out, in·k…), from initialisations that replace it; None leaves it unchanged.
        extra: The variant's parameters. The layer fills them in; an initialisation leaves this empty.
        residual: ``(A₀, B₀)``, frozen: the update is ``s·(BA − B₀A₀)``; None where it is ``s·BA``.
        fresh: A, B and the bias are new tensors, which a layer may keep instead of copies.
        unmeasured: This is the default start, used until the statistics have been measured.
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

    It is exactly zero at the start, and precise afterwards in any dtype, since the small differences are
    taken before anything is multiplied or rounded. Differentiable in A and B.

    Args:
        a: A (r, in, k…).
        b: B (out, r, 1…).
        residual: ``(A₀, B₀)`` of the same shapes.
    """
    a0, b0 = residual
    return torch.cat([a, a - a0]), torch.cat([b - b0, b0], dim=1)


class Init(abc.ABC):
    """One initialisation. Defining a subclass registers it."""

    #: The values of ``init_lora_weights`` that select it.
    names: ClassVar[tuple[bool | str, ...]] = ()
    #: Whether the adapted model equals the base model until trained.
    identity: ClassVar[bool] = True
    #: Whether that holds bit for bit; otherwise up to rounding.
    exact: ClassVar[bool] = True
    #: Whether it replaces the base weight, permanently and for all adapters.
    replaces_base: ClassVar[bool] = False
    #: Whether its start, which is not zero, is subtracted from the update: ``s·(BA − B₀A₀)``. The published
    #: methods subtract it from the base weight instead, which would change the base for other adapters.
    subtracts_start: ClassVar[bool] = False
    #: Whether it reads the base weight, without changing it or subtracting from it.
    reads_weight: ClassVar[bool] = False
    #: Whether B stays as it starts, and only A is trained.
    freezes_b: ClassVar[bool] = False
    #: Whether it is for linear layers and embeddings alone, as in PEFT, which reads its files.
    linear_only: ClassVar[bool] = False
    #: Whether it is computed from the layer's inputs, which therefore must be floating-point numbers.
    measures_inputs: ClassVar[bool] = False
    #: The call that measures the statistics it needs, or "" if it needs none.
    measured_by: ClassVar[str] = ""
    #: Whether that call is made after the adapter was added; until then it has the default start.
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
        """Whether this value of ``init_lora_weights`` selects this initialisation."""
        return any(value is name or (isinstance(name, str) and value == name) for name in self.names)

    def refuses(self, spec: LoraSpec, layer_type: str, as_matrix: bool) -> str | Text | None:
        """Why it cannot initialise such a layer, or None.

        Args:
            spec: The settings of the adapter on the module.
            layer_type: Name of the base layer's type.
            as_matrix: Whether the layer's update is one matrix product ``B @ A``.
        """
        return None

    def lacks(self, stats: Any) -> bool:
        """Whether it needs statistics that are missing."""
        return bool(self.measured_by) and not self.measured_in_place and stats is None

    @abc.abstractmethod
    def __call__(self, request: InitRequest) -> InitResult:
        """Compute the factors from the request alone, without side effects."""


def find(value: bool | str) -> Init:
    """The initialisation that ``init_lora_weights=value`` selects.

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
    load_plugins()
    return tuple(_inits)


class _Statistics(dict[str, Any]):
    """Statistics by the name of a weight. A deep copy of the module shares them; a pickle has none."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Statistics:
        return _Statistics(self)

    def __reduce__(self) -> tuple[type[_Statistics], tuple[()]]:
        return (_Statistics, ())


def note_statistics(module: nn.Module, stats: Any, weight: str = "weight") -> None:
    """Keep statistics of a base module, and of copies made of it, until an adapter is initialised from them.

    A pickle of the model does not contain them.
    """
    module.__dict__.setdefault("_veneer_statistics", _Statistics())[weight] = stats


def statistics_of(module: nn.Module, weight: str = "weight") -> Any:
    return module.__dict__.get("_veneer_statistics", {}).get(weight)


def forget_statistics(module: nn.Module) -> None:
    module.__dict__.pop("_veneer_statistics", None)


def kaiming(request: InitRequest, parameter: str, shape: tuple[int, ...]) -> Tensor:
    """Kaiming-uniform with a = √5.

    That is U(−1/√fan_in, 1/√fan_in) with fan_in = in·k….
    """
    bound = 1.0 / math.sqrt(max(1, math.prod(shape[1:])))
    return torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=request.generator(parameter))


def normal(request: InitRequest, parameter: str, shape: tuple[int, ...], std: float = 1.0) -> Tensor:
    return torch.empty(shape, device="cpu").normal_(0.0, std, generator=request.generator(parameter))


def zero_bias(request: InitRequest) -> Tensor | None:
    return torch.zeros(request.shape_b[0], device="cpu") if request.bias else None


def filled(request: InitRequest, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Extend factors of fewer than r rows and columns to the requested shapes; ``B @ A`` stays the same.

    The added part is zero in one factor and random in the other, so that it can learn.

    Args:
        request: The request.
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
    """The start (a, b), with itself as the residual that is subtracted from the update."""
    a, b = filled(request, a, b)
    return InitResult(a, b, residual=(a, b))


def not_one_matrix(what: str, layer_type: str) -> str:
    return f"{what} needs one matrix, and the update of this {layer_type} is none (groups, or a stack)"
