"""What a storage of base weights must answer."""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn

from veneer.errors import MergeError

_backends: list[Backend] = []


class Backend(abc.ABC):
    """Reads and writes the weight of a base layer, however it is stored.

    Defining a subclass registers it. Those with the higher `priority` are asked first.
    """

    priority: int = 0
    name: str = ""
    #: The field's name of the quantised storage, or None for weights that are not quantised.
    quantization: str | None = None

    def __init_subclass__(cls) -> None:
        _backends.append(cls())
        _backends.sort(key=lambda b: -b.priority)

    @abc.abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether this backend stores the weight of ``module``."""

    @abc.abstractmethod
    def read(self, module: nn.Module, name: str = "weight") -> Tensor:
        """The dense tensor of that name: the stored one itself where it is dense."""

    @abc.abstractmethod
    def write(self, module: nn.Module, tensor: Tensor, name: str = "weight") -> None:
        """Store ``tensor`` as the weight of that name, in place where shape and dtype allow."""

    def device(self, module: nn.Module) -> torch.device:
        """Where the factors beside this layer belong: the device that computes with it."""
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
        """The floating-point type that the tensor of that name is computed with in."""
        return self.dtype(module) if name == "weight" else self.read(module, name).dtype

    def writable_in_place(self, module: nn.Module) -> bool:
        """Whether `read` gives the very tensor that the layer computes with."""
        return False

    def refuses_merge(self, module: nn.Module) -> str | None:
        """Why the weight cannot be written, or None."""
        return None

    def refuses_to_write(self, module: nn.Module, name: str) -> str | None:
        """Why the tensor of that name cannot be written, or None."""
        return self.refuses_merge(module) if name == "weight" else None


def find(module: nn.Module, name: str = "weight") -> Backend:
    """The backend that stores the weight, or the tensor of that name, of ``module``.

    Raises:
        MergeError: If none does.
    """
    for backend in _backends:
        if backend.holds(module, name):
            return backend
    raise MergeError(f"the weight of a {type(module).__name__} is stored in a way that Veneer does not know")


def backends() -> tuple[Backend, ...]:
    """All registered backends, in the order in which they are asked."""
    return tuple(_backends)
