"""What a low-ranked layer is built of: factors, frozen terms, the undo of a merge, stand-ins for its base."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.adapters import begin
from veneer.layers.strengths import Strengths
from veneer.ops.merging import is_finite
from veneer.sharded import gathered
from veneer.spec import LoraSpec

NOTHING: Mapping[str, Any] = MappingProxyType({})
#: What a merge keeps so that it can be undone: a copy of the weight, or nothing.
Undoing = Literal["copy"] | None
#: Names of the frozen term ``A₀``, ``B₀`` of an adapter, for initialisations that subtract their start.
RESIDUAL = ("lora_residual_A", "lora_residual_B")


def empty() -> nn.ModuleDict:
    """An ``nn.ModuleDict`` without entries."""
    made = nn.ModuleDict.__new__(nn.ModuleDict)
    begin(made)
    return made


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

        A factor that is sharded or offloaded by itself has them only while it is called.
        """
        return (
            type(module) in (Factor, Mirror)
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


class Mirror(nn.Module):
    """A factor of another layer, transposed: one tensor and one gradient under two names.

    It has no parameter of its own. Its state dict names the weight all the same; loading one writes it into
    the owner's.

    Args:
        owner: Where the other layer keeps its factors by adapter name.
        name: The adapter.
    """

    bias = None

    def __init__(self, owner: nn.ParameterDict, name: str) -> None:
        super().__init__()
        self._owner = [owner]  # in a list: registered, its tensors would be saved a second time
        self.name = name

    @property
    def weight(self) -> Tensor:
        """The owner's factor, transposed."""
        factor: Tensor = self._owner[0][self.name]
        return factor.T

    def forward(self, x: Tensor, operation: Callable[..., Tensor] = F.linear) -> Tensor:
        """``operation(x, weight)`` in the type of ``x``."""
        return operate(self.weight, None, x, operation)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        value = state_dict.get(f"{prefix}weight")
        if value is not None and not value.is_meta:
            with torch.no_grad():
                self.weight.copy_(value)


@dataclass(frozen=True)
class Prepared:
    """An adapter of one layer, ready to be stored: nothing of it has to be made any more.

    Attributes:
        spec: What the layer gets.
        held: The factors and what else the adapter has, by the names of the containers.
        dropout: Its dropout.
        strengths: Its strength; those of the layer's other adapters too, if their tensors have to move.
        write_base: Gives the base another weight; None where it keeps its own.
    """

    spec: LoraSpec
    held: Mapping[str, nn.Module | nn.Parameter]
    dropout: nn.Module
    strengths: Strengths
    write_base: Callable[[], None] | None


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


class Update(NamedTuple):
    """What merging an adapter into a layer adds, however its factors change later.

    Attributes:
        a: A, as stored.
        b: B, as stored.
        bias: The bias of B, or None.
        extra: What the variant has beside them.
        scaling: s.
        variant: Name of the variant.
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None
    extra: Mapping[str, Tensor]
    scaling: float
    variant: str

    def size(self) -> float:
        """A bound for its elements; infinite or undefined where one of them may be."""
        return abs(self.scaling) * math.prod(
            float(torch.linalg.vector_norm(gathered(factor).float())) for factor in (self.a, self.b)
        )

    def is_finite(self, size: float) -> bool:
        """Whether all of it is, given its `size`."""
        tensors = [*self.extra.values(), *(() if self.bias is None else (self.bias,))]
        if not math.isfinite(size):  # finite factors may have a norm that is not
            tensors += [self.a, self.b]
        return math.isfinite(self.scaling) and all(is_finite(gathered(tensor)) for tensor in tensors)

    def copied(self) -> Update:
        """The same with tensors of its own."""
        bias = None if self.bias is None else self.bias.clone()
        extra = {key: tensor.clone() for key, tensor in self.extra.items()}
        return self._replace(a=self.a.clone(), b=self.b.clone(), bias=bias, extra=extra)


class Undo(nn.Module):
    """The base's tensors as they were before merging, and what was merged.

    `coded` says that they are as a quantised storage keeps them, and not the weight itself. `updates` are
    what was merged, by adapter name, in the types that they had.

    They are buffers that are not saved: they follow the layer to another device or dtype, into a
    deepcopy and a pickle, and stay out of every state dict.
    """

    attributes: dict[str, Any]
    coded: bool
    updates: dict[str, Update]

    def __init__(
        self, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], coded: bool = False
    ) -> None:
        begin(self)
        # Past `nn.Module.__setattr__`, which is slow: a model that is merged gets hundreds of these.
        self.__dict__.update(coded=coded, attributes=dict(attributes), updates={})
        self._buffers.update(tensors)
        self._non_persistent_buffers_set.update(tensors)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their name on the base layer."""
        return {name: buffer for name, buffer in self._buffers.items() if buffer is not None}


def not_an_undo(undo: object) -> str | None:
    """Why that is no way of undoing a merge, or None."""
    if undo in ("copy", None):
        return None
    gone = (
        "it was removed, as it saved one byte for each weight and doubled the time: "
        if undo == "residual"
        else ""
    )
    return f"undo={undo!r} does not exist; {gone}use undo='copy'"


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
    for name in tensors:  # FSDP1 puts its own tensors there, and they would come first
        state.pop(name, None)
    state.update(attributes)
    return twin


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside the wrappers that shards, checkpoints and compilers put around one."""
    names = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
    while (inner := next((module._modules[n] for n in names if n in module._modules), None)) is not None:
        module = inner
    return module
