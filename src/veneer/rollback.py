"""What modules were before a change, put back if the change fails."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from torch import nn

from veneer.backends import Backend
from veneer.ops.merging import spare_copy

#: Tables of an `nn.Module`, which are changed in place.
_TABLES = ("_parameters", "_buffers", "_modules")


class Rollback:
    """A change of several modules that succeeds as a whole, or has not happened.

    When an exception leaves the block, all that was held is put back, the last first, and the exception goes
    on: the same objects, tensors among them, with the same bits. When the block ends well, it is forgotten.

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
        """Call a function before all that was held until now is put back."""
        self._steps.callback(step, *args)

    def hold(self, *things: Any) -> None:
        """Remember the attributes of objects, and the parameters, buffers and children of modules.

        That is which objects they are, not the values of tensors that are written in place.
        """
        for thing in things:
            attributes = dict(vars(thing))
            tables = {key: dict(attributes[key]) for key in _TABLES if key in attributes}
            self.on_failure(_put_back, thing, attributes, tables)

    def hold_values(self, backend: Backend, module: nn.Module, name: str, *, briefly: bool = False) -> None:
        """Remember the values of the tensor of that name. The module is to be held before.

        Args:
            backend: How the tensor is stored.
            module: Its module.
            name: Its name.
            briefly: This block ends before the next one that holds values briefly: their memory is the same.
        """
        if briefly and backend.writable_in_place(module):
            kept = spare_copy(backend.read(module, name))
            self.on_failure(backend.put_back, module, {name: kept}, name)
        elif backend.holds(module, name):
            self.on_failure(backend.put_back, module, backend.keep(module, name), name)
        else:  # beside what is stored: a bias
            self.on_failure(backend.write, module, backend.read(module, name).clone(), name)

    def take_over(self, other: Rollback) -> None:
        """Hold what another one holds, until this one ends."""
        self._steps.push(other._steps.pop_all())


def _put_back(thing: Any, attributes: dict[str, Any], tables: dict[str, dict[str, Any]]) -> None:
    state = vars(thing)
    state.clear()
    state.update(attributes)
    for key, table in tables.items():
        state[key].clear()
        state[key].update(table)
