"""Modules that an adapter trains in full (`modules_to_save`), such as a head or a norm."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Reversible, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from veneer import backends
from veneer.adapters import AdapterModule, as_names
from veneer.errors import AdapterNameError
from veneer.layers.by_adapter import by_adapter
from veneer.routing import Routing, call_by_rows, current


class ModulesToSaveWrapper(AdapterModule):
    """A module and the copies of it that adapters train.

    If the active adapter has a copy, the copy is called, otherwise the original. Two adapters that both have
    a copy cannot be active together.

    Args:
        module_to_save: The original, which is not changed.
        tied_to: For a head that shares an embedding's weight: the embedding's wrapper; copies share theirs.
    """

    def __init__(self, module_to_save: nn.Module, tied_to: ModulesToSaveWrapper | None = None) -> None:
        super().__init__()
        self.original_module = module_to_save
        self.modules_to_save = nn.ModuleDict()
        self.training = module_to_save.training
        # In a list: a module as an attribute would be registered, and saved twice.
        self._tied_to = [] if tied_to is None else [tied_to]

    @property
    def tied_adapter(self) -> ModulesToSaveWrapper | None:
        return self._tied_to[0] if self._tied_to else None

    @property
    def held_adapters(self) -> tuple[str, ...]:
        return tuple(self.modules_to_save)

    def inner(self) -> Reversible[tuple[str, nn.Module | None]]:
        return (("original_module", self.original_module),)

    def adapter_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """The parameters of an adapter's copy, without a weight that belongs to the embedding."""
        shared = () if self.tied_adapter is None else ("weight",)
        return (p for key, p in self.modules_to_save[name].named_parameters() if key not in shared)

    def add_copy(self, name: str, module: nn.Module) -> None:
        """Add a copy for an adapter, which is trainable once it is activated."""
        if self.tied_adapter is not None:
            module.weight = self.tied_adapter.modules_to_save[name].weight
        self.modules_to_save[name] = module.requires_grad_(False)

    def new_copy(self) -> nn.Module:
        return backends.copied(self.original_module)

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """The names on disk and in memory of an adapter's tensors; transformers calls this."""
        own = self.modules_to_save[adapter_name].state_dict() if adapter_name in self.modules_to_save else ()
        return {key: f"modules_to_save.{adapter_name}.{key}" for key in own}

    def copying(self, old: str, new: str) -> Callable[[], None]:
        return partial(self.add_copy, new, copy.deepcopy(self.modules_to_save[old]))

    def drop_adapter(self, name: str) -> None:
        del self.modules_to_save[name]

    def move_adapter(self, old: str, new: str) -> None:
        self.modules_to_save[new] = self.modules_to_save.pop(old)

    def refuses_active(self, names: Sequence[str]) -> str | None:
        """Two copies cannot be active together."""
        mine = [name for name in names if name in self.modules_to_save]
        if len(mine) < 2:
            return None
        return (
            f"the adapters {', '.join(map(repr, mine))} each trained their own copy of the same module "
            f"(a {type(self.original_module).__name__}); only one of them can be active at a time"
        )

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones.

        Raises:
            AdapterNameError: If more than one of them has its own copy of this module.
        """
        names = as_names(adapter_names)
        if (reason := self.refuses_active(names)) is not None:
            raise AdapterNameError(reason)
        super().set_adapter(names, inference_mode=inference_mode)

    @property
    def current(self) -> nn.Module:
        """The module that is called now."""
        if not self.disable_adapters:
            for name in self._active:
                if name in self.modules_to_save:
                    return self.modules_to_save[name]
        return self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the current module; in a mixed batch, the copy of each row's adapter."""
        if "adapter_names" in kwargs:
            return call_by_rows(self, kwargs.pop("adapter_names"), *args, **kwargs)
        if (routing := current(self)) is not None and not self._disabled:
            return self._forward_rows(routing, *args, **kwargs)
        return self.current(*args, **kwargs)

    def _forward_rows(self, routing: Routing, *args: Any, **kwargs: Any) -> Any:
        kind = f"a {type(self.original_module).__name__} (modules_to_save)"
        held = tuple(self.modules_to_save)

        def of(name: str | None) -> nn.Module:
            return self.original_module if name is None else self.modules_to_save[name]

        return by_adapter(routing, held, kind, of, args, kwargs)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                if "original_module" not in self.__dict__.get("_modules", {}) or name.startswith("_"):
                    raise
                return getattr(self.current, name)
