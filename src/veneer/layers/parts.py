"""What a low-ranked layer is built of: factors, frozen terms, the undo of a merge, stand-ins for its base."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

NOTHING: Mapping[str, Any] = MappingProxyType({})
#: Names of the frozen term ``A₀``, ``B₀`` of an adapter, for initialisations that subtract their start.
RESIDUAL = ("lora_residual_A", "lora_residual_B")


class Factor(nn.Module):
    """One thin factor: a weight with its operation, and no `torch.nn.Linear`.

    Whatever sweeps a model for linears (a quantiser, a second injection) leaves it alone.

    Args:
        weight: The factor.
        bias: Added by the operation, or None.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
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

        A factor that is sharded or offloaded by itself has them only while it is called.
        """
        return (
            type(module) is Factor
            and "forward" not in module.__dict__
            and not (module._forward_hooks or module._forward_pre_hooks)
        )

    @staticmethod
    def read(module: nn.Module) -> Tensor:
        """The weight of a factor: itself where it is there to read, else a copy that gradients go through."""
        if Factor.is_plain(module):
            return module.weight  # type: ignore[return-value]
        return module(None, _copy_of_weight)  # type: ignore[no-any-return]

    @staticmethod
    def parameters_of(held: nn.Module | nn.Parameter) -> Collection[nn.Parameter]:
        """The parameters of a factor that is wrapped, or a mere parameter."""
        return (held,) if isinstance(held, nn.Parameter) else [*held.parameters()]

    def extra_repr(self) -> str:
        """The shape, for ``print(model)``."""
        return "×".join(map(str, self.weight.shape)) + (" + bias" if self.bias is not None else "")


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
    """What a `Factor` with that weight computes."""
    return operation(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _copy_of_weight(x: None, weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight.clone()


class Undo(nn.Module):
    """The base's tensors as they were before merging.

    `coded` says that they are as a quantised storage keeps them, and not the weight itself.

    They are buffers that are not saved: they follow the layer to another device or dtype, into a
    deepcopy and a pickle, and stay out of every state dict.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], coded: bool = False
    ) -> None:
        super().__init__()
        self.coded = coded
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)
        self.attributes = dict(attributes)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their name on the base layer."""
        return {name: buffer for name, buffer in self._buffers.items() if buffer is not None}


def stand_in(
    base: nn.Module, tensors: Mapping[str, Tensor | None], attributes: Mapping[str, Any] = NOTHING
) -> nn.Module:
    """A copy of ``base`` that computes with other tensors; ``base`` itself is not touched.

    It shares everything but the named parameters and attributes, so a subclass's own forward runs as it
    is written. Offloading hooks are left out: the tensors given are the ones to compute with.
    """
    # Not copy.copy: compilers cannot follow it.
    twin: nn.Module = object.__new__(type(base))
    twin.__dict__.update(base.__dict__)
    state = twin.__dict__
    state["_parameters"] = {**base._parameters, **tensors}
    if "_hf_hook" in state:
        for name in ("forward", "_hf_hook", "_old_forward"):
            state.pop(name, None)
    state.update(attributes)
    return twin


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside the wrappers that shards, checkpoints and compilers put around one."""
    names = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
    while (inner := next((module._modules[n] for n in names if n in module._modules), None)) is not None:
        module = inner
    return module
