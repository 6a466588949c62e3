"""A plain floating-point tensor: the ordinary case."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from veneer.backends.base import Backend, refuses_computed


class Dense(Backend):
    """The weight is a plain parameter of the module."""

    name = "dense"
    fresh_output = (
        "torch.nn.modules.linear.Linear",
        "torch.nn.modules.sparse.Embedding",
        *(f"torch.nn.modules.conv.Conv{n}d" for n in (1, 2, 3)),
    )

    def matches(self, module: nn.Module) -> bool:
        return self.holds(module, "weight")

    def holds(self, module: nn.Module, name: str) -> bool:
        tensor = getattr(module, name, None)
        return isinstance(tensor, Tensor) and tensor.is_floating_point()

    def read(self, module: nn.Module, name: str = "weight") -> Tensor:
        tensor: Tensor = getattr(module, name)
        return tensor.detach()

    def write(self, module: nn.Module, tensor: Tensor, name: str = "weight") -> None:
        """Copy into the parameter; a tensor of another shape becomes a new parameter."""
        parameter: nn.Parameter = getattr(module, name)
        if parameter.shape == tensor.shape:
            with torch.no_grad():
                parameter.copy_(tensor)
        else:
            # A new shape needs a new parameter: an optimizer may refer to the old one.
            new = nn.Parameter(tensor.to(parameter.dtype), requires_grad=parameter.requires_grad)
            setattr(module, name, new)

    def writable_in_place(self, module: nn.Module) -> bool:
        return True

    def refuses_merge(self, module: nn.Module) -> str | None:
        return refuses_computed(module, "weight")
