"""The interface of a storage of base weights."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks

from veneer.errors import MergeError
from veneer.registry import load_plugins

_backends: list[Backend] = []
_geometries: dict[str, str] = {}
_T = TypeVar("_T")
_cached: dict[Any, dict[Any, Any]] = {}


def _cached_by_type(function: Callable[[Any], _T]) -> Callable[[Any], _T]:
    """Cache a function of a type or a name until another backend is registered."""

    def call(key: Any) -> _T:
        if torch.compiler.is_compiling():  # a compiler must not see the cache change
            return function(key)
        known = _cached.setdefault(function, {})
        if key not in known:
            known[key] = function(key)
        return known[key]  # type: ignore[no-any-return]

    return call


class Backend(abc.ABC):
    """Reads and writes the weight of a base layer, however it is stored.

    Defining a subclass registers it. Those with the higher `priority` are asked first.
    """

    priority: int = 0
    name: str = ""
    #: The usual name of the quantised storage, or None for weights that are not quantised.
    quantization: str | None = None
    #: Whether `read` returns the weight; some weights can only be computed with.
    readable: ClassVar[bool] = True
    #: Module types, as "module.QualName", that keep no reference to their output, so it may be changed in
    #: place.
    fresh_output: ClassVar[tuple[str, ...]] = ()
    #: Module types that derive from no torch layer, and the torch type whose geometry each of them has.
    geometry: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls) -> None:
        if "name" not in cls.__dict__:  # what several backends share
            return
        _backends.append(cls())
        _backends.sort(key=lambda b: -b.priority)
        _geometries.update(cls.geometry)
        _cached.clear()

    def serves(self, kind: type) -> bool:
        """Whether it may store weights of modules of that type. Called once per type, before `matches`."""
        return True

    @abc.abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether this backend stores the weight of ``module``, whose type it serves."""

    @abc.abstractmethod
    def read(self, module: nn.Module, name: str = "weight") -> Tensor:
        """The dense tensor of that name: the stored tensor itself if it is dense."""

    @abc.abstractmethod
    def write(self, module: nn.Module, tensor: Tensor, name: str = "weight") -> None:
        """Store ``tensor`` as the weight of that name, in place where shape and dtype allow."""

    def writing(self, module: nn.Module, tensor: Tensor, name: str = "weight") -> Callable[[], None]:
        """A function that does ``write(module, tensor, name)``; memory is allocated now, not when it runs."""
        device, dtype = self.tensor_device(module, name), self.tensor_dtype(module, name)
        return partial(self.write, module, tensor.detach().to(device=device, dtype=dtype), name)

    def device(self, module: nn.Module) -> torch.device:
        """The device of the layer's computation, where the factors belong."""
        return self.read(module).device

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The floating-point type that the layer computes in."""
        return self.read(module).dtype

    def holds(self, module: nn.Module, name: str) -> bool:
        """Whether this backend stores the tensor of that name of ``module``."""
        return name == "weight" and self.matches(module)

    def tensor_device(self, module: nn.Module, name: str) -> torch.device:
        """The device that computes with the tensor of that name."""
        return self.device(module) if name == "weight" else self.read(module, name).device

    def tensor_dtype(self, module: nn.Module, name: str) -> torch.dtype:
        """The floating-point type in which the tensor of that name is used."""
        return self.dtype(module) if name == "weight" else self.read(module, name).dtype

    def like(self, module: nn.Module, name: str = "weight") -> Tensor:
        """A meta tensor with the shape and type of the dense tensor of that name."""
        return self.read(module, name).to("meta")

    def features(self, module: nn.Module) -> tuple[int, int]:
        """Input and output size of a linear layer."""
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]

    def writable_in_place(self, module: nn.Module) -> bool:
        """Whether `read` returns the very tensor that the layer computes with."""
        return False

    def refuses_merge(self, module: nn.Module) -> str | None:
        """Why the weight cannot be written, or None."""
        return None

    def refuses_to_write(self, module: nn.Module, name: str) -> str | None:
        """Why the tensor of that name cannot be written, or None."""
        return self.refuses_merge(module) if name == "weight" else refuses_computed(module, name)

    def keep(self, module: nn.Module, name: str = "weight") -> dict[str, Tensor]:
        """A copy of the stored tensor of that name, which `put_back` restores bit for bit.

        Values that a cast of the model must not round are stored as integers, or in a type that a cast
        ignores.
        """
        return {name: self.read(module, name).clone()}

    def put_back(self, module: nn.Module, kept: Mapping[str, Tensor], name: str = "weight") -> None:
        """Store what `keep` returned."""
        self.write(module, kept[name], name)

    def parts(
        self, module: nn.Module, kept: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
        """Parameters and attributes for a copy of the module that computes with what `keep` returned."""
        return dict(kept), {}

    def prepare_backward(self, module: nn.Module) -> None:
        """Prepare a module for gradients to pass through it. Its values do not change."""
        return None

    def dense(self, module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """An ordinary module that computes the same with a dense weight; the module itself if its own is."""
        return module


def refuses_computed(module: nn.Module, name: str) -> str | None:
    """Why a tensor that is recomputed at each call cannot be written, or None."""
    if module._parameters.get(name) is not None:
        return None
    return (
        f"its {name} is computed from other tensors (a parametrization or weight norm), so an update written "
        "into it would be lost; remove the parametrization first"
    )


def find(module: nn.Module, name: str = "weight") -> Backend:
    """The backend that stores the weight, or the tensor of that name, of ``module``.

    Raises:
        MergeError: If none does.
    """
    for backend in serving(type(module)):
        if backend.holds(module, name):
            return backend
    raise MergeError(f"the weight of a {type(module).__name__} is stored in a way that Veneer does not know")


def serving(kind: type) -> tuple[Backend, ...]:
    load_plugins()
    return _serving(kind)


@_cached_by_type
def _serving(kind: type) -> tuple[Backend, ...]:
    return tuple(backend for backend in _backends if backend.serves(kind))


def type_names(cls: type) -> tuple[str, ...]:
    """A type and its bases as ``"module.QualName"``, nearest first."""
    return _names_of(cls)


@_cached_by_type
def _names_of(cls: type) -> tuple[str, ...]:
    return tuple(f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__)


def geometry(cls: type) -> str | None:
    """The torch type, as ``"module.QualName"``, that modules of a type without one behave like."""
    return next((_geometries[name] for name in type_names(cls) if name in _geometries), None)


@_cached_by_type
def _fresh(name: str) -> bool:
    return any(name in backend.fresh_output for backend in _backends)


def gives_fresh_output(module: nn.Module) -> bool:
    """Whether nothing else refers to the module's output, so that it may be changed in place."""
    cls = type(module)
    hooked = module._forward_hooks or _global_forward_hooks or "forward" in module.__dict__
    return not hooked and _fresh(f"{cls.__module__}.{cls.__qualname__}")


def plain_linear(module: nn.Module, weight: Tensor) -> nn.Linear:
    """A frozen ``nn.Linear`` with a dense weight and the bias of ``module``."""
    bias = getattr(module, "bias", None)
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if isinstance(bias, Tensor):
        plain.bias = nn.Parameter(bias.detach().to(weight.dtype, copy=True), requires_grad=False)
    return plain.train(module.training)
