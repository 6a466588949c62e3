"""Earlier states of modules: restored if a change fails (`Rollback`), or when it is undone (`Undo`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.adapters import begin
from veneer.backends import Backend
from veneer.ops.merging import is_finite, spare_copy
from veneer.sharded import gathered

#: Tables of an `nn.Module`, which are changed in place.
_TABLES = ("_parameters", "_buffers", "_modules")


class Rollback:
    """A change of several modules that succeeds as a whole, or has not happened.

    When an exception leaves the block, everything that was held is restored in reverse order, the same
    objects and tensors with the same bits, and the exception is raised again. When the block succeeds, it is
    forgotten.

        with Rollback() as back:
            back.hold(module)
            back.hold_values(backend, module, "weight")
            ...  # change the module
    """

    def __init__(self) -> None:
        self._steps = ExitStack()

    def __enter__(self) -> Rollback:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._steps.pop_all()
        else:
            self._steps.__exit__(kind, error, trace)

    def on_failure(self, step: Callable[..., Any], *args: Any) -> None:
        """On a failure, call a function before everything that was held until now is restored."""
        self._steps.callback(step, *args)

    def hold(self, *things: Any) -> None:
        """Remember the attributes of objects, and the parameters, buffers and children of modules.

        These are the objects themselves, not the values of tensors that are written in place.
        """
        for thing in things:
            attributes = dict(vars(thing))
            tables = {key: dict(attributes[key]) for key in _TABLES if key in attributes}
            self.on_failure(_put_back, thing, attributes, tables)

    def hold_values(self, backend: Backend, module: nn.Module, name: str, *, briefly: bool = False) -> None:
        """Remember the values of the tensor of that name. The module must be held first.

        Args:
            backend: How the tensor is stored.
            module: Its module.
            name: Its name.
            briefly: This block ends before the next one that holds values briefly, so both may use the same
                memory.
        """
        if briefly and backend.writable_in_place(module):
            kept = spare_copy(backend.read(module, name))
            self.on_failure(backend.put_back, module, {name: kept}, name)
        elif backend.holds(module, name):
            self.on_failure(backend.put_back, module, backend.keep(module, name), name)
        else:  # not part of the stored weight: a bias
            self.on_failure(backend.write, module, backend.read(module, name).clone(), name)

    def take_over(self, other: Rollback) -> None:
        self._steps.push(other._steps.pop_all())


def _put_back(thing: Any, attributes: dict[str, Any], tables: dict[str, dict[str, Any]]) -> None:
    state = vars(thing)
    state.clear()
    state.update(attributes)
    for key, table in tables.items():
        state[key].clear()
        state[key].update(table)


class Update(NamedTuple):
    """What merging an adapter adds to a weight: ``s·BA``, or what its variant makes of that.

    Attributes:
        a: A, as stored.
        b: B, as stored.
        bias: The bias of B, or None.
        extra: Further parameters of the variant.
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
        """A bound for its elements; infinite or NaN if an element may be."""
        return abs(self.scaling) * math.prod(
            float(torch.linalg.vector_norm(gathered(factor).float())) for factor in (self.a, self.b)
        )

    def is_finite(self, size: float) -> bool:
        """Whether all elements are finite, given `size`."""
        tensors = [*self.extra.values(), *(() if self.bias is None else (self.bias,))]
        if not math.isfinite(size):  # the norm of finite factors may overflow
            tensors += [self.a, self.b]
        return math.isfinite(self.scaling) and all(is_finite(gathered(tensor)) for tensor in tensors)

    def copied(self) -> Update:
        """The same with tensors of its own."""
        bias = None if self.bias is None else self.bias.clone()
        extra = {key: tensor.clone() for key, tensor in self.extra.items()}
        return self._replace(a=self.a.clone(), b=self.b.clone(), bias=bias, extra=extra)


class Rows(NamedTuple):
    """What merging an adapter's tokens writes: rows that replace rows of a weight.

    Attributes:
        places: Which rows, (n,).
        rows: The new ones, (n, dim).
        bias: None; an `Update` may have one.
    """

    places: Tensor
    rows: Tensor
    bias: None = None

    def copied(self) -> Rows:
        return Rows(self.places.clone(), self.rows.clone())


class Undo(nn.Module):
    """The base's tensors as they were before merging, and what was merged.

    The tensors are buffers that are not saved: they follow the layer to another device or dtype, into a
    deepcopy and a pickle, and stay out of every state dict.

    Attributes:
        attributes: Attributes of the base that merging changed.
        coded: The tensors are those of a quantised storage, not the weight itself.
        updates: What was merged, by adapter name, in its original types.
    """

    attributes: Mapping[str, Any]
    coded: bool
    updates: Mapping[str, Update | Rows]

    def __init__(self) -> None:
        begin(self)  # past `nn.Module.__setattr__`, which is slow: a merged model has hundreds of these
        self.__dict__.update(attributes={}, coded=False, updates={})

    def keep(self, **tensors: Tensor) -> None:
        self._buffers.update(tensors)
        self._non_persistent_buffers_set.update(tensors)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their names on the base; ``places`` and ``rows`` if only rows are kept."""
        return {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
