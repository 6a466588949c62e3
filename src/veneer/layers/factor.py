"""Modules for an adapter's tensors in a layer, and copies of a base with other tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.adapters import begin
from veneer.files.keys import WRAPPERS

NOTHING: Mapping[str, Any] = MappingProxyType({})
#: Names of the frozen term ``A₀``, ``B₀`` of an adapter, for initialisations that subtract their start.
RESIDUAL = ("lora_residual_A", "lora_residual_B")


def empty() -> nn.ModuleDict:
    """An ``nn.ModuleDict`` without entries."""
    made = nn.ModuleDict.__new__(nn.ModuleDict)
    begin(made)
    return made


class Factor(nn.Module):
    """A factor, A or B: a weight with its operation, but not a `torch.nn.Linear`.

    So code that replaces all linear layers of a model (a quantiser, a second injection) ignores it.

    Args:
        weight: The factor.
        bias: Added by the operation, or None.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        begin(self)
        # Past `nn.Module.__setattr__`, which is slow: models have hundreds of these.
        self._parameters["weight"] = nn.Parameter(weight)
        if bias is None:
            self.__dict__["bias"] = None
        else:
            self._parameters["bias"] = nn.Parameter(bias)

    def forward(self, x: Tensor | None, operation: Callable[..., Tensor] = F.linear) -> Tensor:
        """``operation(x, weight, bias)`` in the type of ``x``: the factor is cast, never the activations."""
        if x is None:
            return operation(x, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return operation(x, self.weight.to(x.dtype), bias)

    @staticmethod
    def is_plain(module: nn.Module) -> bool:
        """Whether the tensors of a factor may be used without calling it.

        A factor that is sharded or offloaded only has them while it is called.
        """
        return (
            type(module) in (Factor, Mirror)
            and "forward" not in module.__dict__
            and not (module._forward_hooks or module._forward_pre_hooks)
        )

    @staticmethod
    def read(module: nn.Module) -> Tensor:
        """The weight of a factor: itself if it is available, else a copy through which gradients flow."""
        if Factor.is_plain(module):
            return module.weight  # type: ignore[return-value]
        return module(None, _copy_of_weight)  # type: ignore[no-any-return]

    @staticmethod
    def parameters_of(held: nn.Module | nn.Parameter) -> Collection[nn.Parameter]:
        """The parameters of a factor, which may be wrapped or a bare parameter."""
        return (held,) if isinstance(held, nn.Parameter) else [*held.parameters()]

    def extra_repr(self) -> str:
        return "×".join(map(str, self.weight.shape)) + (" + bias" if self.bias is not None else "")


class Mirror(nn.Module):
    """A factor of another layer, transposed: one tensor and one gradient under two names.

    It has no parameter of its own, but its state dict contains the weight; loading writes it into the
    owner's.

    Args:
        owner: The container of the other layer's factors by adapter name.
        name: The adapter.
    """

    bias = None

    def __init__(self, owner: nn.ParameterDict, name: str) -> None:
        super().__init__()
        self._owner = [owner]  # in a list: if it were registered, its tensors would be saved twice
        self.name = name

    @property
    def weight(self) -> Tensor:
        factor: Tensor = self._owner[0][self.name]
        return factor.T

    def forward(self, x: Tensor, operation: Callable[..., Tensor] = F.linear) -> Tensor:
        return operate(self.weight, None, x, operation)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        value = state_dict.get(f"{prefix}weight")
        if value is not None and not value.is_meta:
            with torch.no_grad():
                self.weight.copy_(value)


class Shared(Mirror):
    """A factor of another embedding: one tensor and one gradient under two names, in `SharedFactors`."""

    @property
    def weight(self) -> Tensor:
        factor: Tensor = self._owner[0][self.name]
        return factor

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Nothing: the container does it."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Nothing: the container does it."""


class SharedFactors(nn.ModuleDict):
    """The factors of an embedding that shares those of another, with the names of a `ParameterDict`."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, factor in self.items():
            weight: Any = factor.weight
            destination[f"{prefix}{name}"] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name, factor in self.items():
            value = state_dict.get(f"{prefix}{name}")
            if value is not None and not value.is_meta:
                with torch.no_grad():
                    factor.weight.copy_(value)  # type: ignore[operator]


class Frozen(nn.Module):
    """A tensor of an adapter that is not trained: a buffer, so no parameter, and in every state dict.

    Args:
        weight: The tensor.
    """

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)


def operate(
    weight: Tensor, bias: Tensor | None, x: Tensor, operation: Callable[..., Tensor] = F.linear
) -> Tensor:
    return operation(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _copy_of_weight(x: None, weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight.clone()


def stand_in(
    base: nn.Module, tensors: Mapping[str, Tensor | None], attributes: Mapping[str, Any] = NOTHING
) -> nn.Module:
    """A copy of ``base`` that computes with other tensors; ``base`` itself is not touched.

    It shares everything except the named parameters and attributes, so the forward of a subclass works
    unchanged. Offloading hooks are left out, since the tensors are given here.
    """
    # Not copy.copy: compilers cannot follow it.
    twin: nn.Module = object.__new__(type(base))
    twin.__dict__.update(base.__dict__)
    state = twin.__dict__
    state["_parameters"] = {**base._parameters, **tensors}
    if "_hf_hook" in state:
        for name in ("forward", "_hf_hook", "_old_forward"):
            state.pop(name, None)
    for name in tensors:  # FSDP1 puts its tensors there, and they would take precedence
        state.pop(name, None)
    state.update(attributes)
    return twin


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside the wrappers of sharding, checkpointing and compilers."""
    while (inner := next((module._modules[n] for n in WRAPPERS if n in module._modules), None)) is not None:
        module = inner
    return module
