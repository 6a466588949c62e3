"""The adapters of one module, and of a model.

An `AdapterModule` is a module of the model that holds tensors of one or more adapters: a LoRA layer, or the
trained copy of a whole module. It knows which of its adapters are active. `AdapterSet` is the view of the
whole model: it finds these modules and applies an operation to all of them. Modules may disagree, since
callers such as diffusion pipelines set each layer by itself; the view reports that and does not correct it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterable, Iterator, Reversible, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from veneer.errors import AdapterNameError, show


def check_adapter_name(name: str, taken: Container[str] = ()) -> None:
    """Refuse a name that cannot be a module name or a directory name, or that an adapter has.

    Raises:
        AdapterNameError: If the name is empty, contains a dot or a path separator, hides a method of the
            containers that adapters live in, or is taken.
    """
    reason = ""
    if not isinstance(name, str) or not name:
        reason = "it must be a non-empty string"
    elif any(c in name for c in "./\\\0"):
        reason = "it becomes part of parameter names and a directory name, so no '.', '/' or '\\'"
    elif name != name.strip() or not name.isprintable() or len(name.encode()) > 200:
        reason = "spaces at its ends, control characters and over 200 bytes do not survive as a file name"
    elif name == "__base__":
        reason = "that name stands for the base model without an adapter"
    elif (
        hasattr(nn.ModuleDict, name) or hasattr(nn.ParameterDict, name) or name in {"training", "base_layer"}
    ):
        reason = "torch's module containers have an attribute of that name"
    if reason:
        raise AdapterNameError(f"{show(name)} cannot be the name of an adapter: {reason}")
    if name in taken:
        raise AdapterNameError(f"an adapter named {name!r} already exists: delete it or choose another name")


def as_names(names: str | Sequence[str]) -> list[str]:
    """One name or several, as a list without repetitions, in order."""
    if isinstance(names, str):
        return [names]
    return list(names) if len(names) < 2 else list(dict.fromkeys(names))


_BLANK = vars(nn.Module())
_KNOWN = all(isinstance(value, dict | set | bool | None) for value in _BLANK.values())


def begin(module: nn.Module) -> None:
    """Do what ``nn.Module.__init__`` does in half the time: wrapping a model makes thousands of modules."""
    if not _KNOWN:  # a version of torch that keeps something else in its modules
        nn.Module.__init__(module)
        return
    state = module.__dict__
    for name, value in _BLANK.items():
        state[name] = value.copy() if isinstance(value, dict | set) else value


class Contexts(threading.local):
    """The contexts in which the current thread has disabled a model's adapters, shared by all its modules.

    A copy of the model starts without any.
    """

    def __init__(self) -> None:
        #: One list per thread. Compilers guard on its length.
        self.open: list[_Context] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Contexts:
        return Contexts()

    def __reduce__(self) -> tuple[type[Contexts], tuple[()]]:
        return Contexts, ()

    def hold(self) -> bool:
        """Whether adapters are disabled now.

        A backward recomputes parts of earlier calls, so only the contexts that it opened itself count there.
        """
        if not self.open:
            return False
        return torch.compiler.is_compiling() or any(c.backward == _backward() for c in self.open)


class _Context:
    def __init__(self) -> None:
        self.backward = _backward()


#: The number of the backward that this thread runs, -1 for none.
_backward = torch._C._current_graph_task_id


@contextmanager
def opened(everywhere: Iterable[Contexts]) -> Iterator[None]:
    """Disable adapters for the thread that opens this context.

    Contexts may end in any order, and in another thread.
    """
    context = _Context()
    lists = [contexts.open for contexts in everywhere]
    for here in lists:
        here.append(context)
    try:
        yield
    finally:
        for here in lists:
            here.remove(context)


class AdapterModule(nn.Module):
    """A module that holds tensors of one or more adapters.

    Subclasses define which adapters they hold (`held_adapters`), which parameters belong to one
    (`adapter_parameters`), and how to drop or rename one.

    Args:
        **state: Initial attributes that are neither tensors nor modules.
    """

    _active: list[str]
    #: Disabled for all threads, until enabled again.
    _disabled: bool
    _contexts: Contexts

    def __init__(self, **state: Any) -> None:
        begin(self)
        # `nn.Module.__setattr__` looks for tensors and modules, which is slow: a model has hundreds of these.
        self.__dict__.update(_active=[], _disabled=False, _contexts=Contexts(), **state)

    # --- for subclasses to define

    @property
    def held_adapters(self) -> tuple[str, ...]:
        """Names of the adapters that have tensors in this module."""
        raise NotImplementedError

    def adapter_parameters(self, name: str) -> Iterator[nn.Parameter]:
        raise NotImplementedError

    def trained_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Those of `adapter_parameters` that are trained while the adapter is."""
        return self.adapter_parameters(name)

    def drop_adapter(self, name: str) -> None:
        raise NotImplementedError

    def move_adapter(self, old: str, new: str) -> None:
        """Keep the adapter's tensors under another name."""
        raise NotImplementedError

    @property
    def tied_adapter(self) -> AdapterModule | None:
        """The module whose tensors this one shares, or None if it has its own."""
        return None

    def refuses_active(self, names: Sequence[str]) -> str | None:
        """Why these adapters, two or more, cannot be active together here, or None."""
        return None

    def adapters_changed(self) -> None:
        """Called whenever adapters were activated, enabled, disabled, added or dropped."""

    @property
    def merged_adapters(self) -> list[str]:
        return []

    def base_device(self) -> torch.device:
        """The device of the base's parameters, where an adapter's belong."""
        parameters = (p for _, child in self.inner() if child is not None for p in child.parameters())
        return next((p.device for p in parameters), torch.device("cpu"))

    def inner(self) -> Reversible[tuple[str, nn.Module | None]]:
        """The children, by name, that belong to the base model and not to an adapter."""
        return self._modules.items()

    # --- for callers

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters; they may include adapters that this module does not hold."""
        return list(self._active)

    @property
    def active_adapter(self) -> list[str]:
        """The same as `active_adapters`, under PEFT's other name."""
        return list(self._active)

    @property
    def disable_adapters(self) -> bool:
        """Whether the module computes what the base model computes, in the current thread."""
        return self._disabled or self._contexts.hold()

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these the active adapters, trainable unless ``inference_mode``, and freeze the others.

        Args:
            adapter_names: One name or several. Names that this module does not have are kept:
                another module may have them.
            inference_mode: Leave the activated parameters frozen.
        """
        before, names = self._active, as_names(adapter_names)
        self.__dict__["_active"] = names
        for name in self.held_adapters:
            active = name in names
            if not active and name not in before:
                continue  # it has been frozen since it was added or deactivated
            trainable = active and not inference_mode
            own = self.trained_parameters(name) if trainable else self.adapter_parameters(name)
            for parameter in own:
                # Quantised or integer parameters cannot require a gradient.
                if parameter.requires_grad is not trainable and (
                    not trainable or parameter.is_floating_point()
                ):
                    parameter.requires_grad = trainable
        self.adapters_changed()

    def set_strength(self, adapter_name: str, factor: float) -> None:
        """Multiply the adapter's configured strength by ``factor``, in modules that have a strength."""

    def copying(self, old: str, new: str) -> Callable[[], None]:
        """Copy the tensors of ``old``; the returned call adds them as the inactive adapter ``new``."""
        raise NotImplementedError

    def copy_adapter(self, old: str, new: str) -> None:
        self.copying(old, new)()

    def note_active(self, names: Sequence[str]) -> None:
        """Make these the active adapters, and leave ``requires_grad`` as it is."""
        self._active = as_names(names)
        self.adapters_changed()

    def enable_adapters(self, enabled: bool) -> None:
        self._disabled = not enabled
        self.adapters_changed()

    def _replicate_for_data_parallel(self) -> AdapterModule:
        """The copy runs in another thread, where contexts of this one are not seen."""
        replica: AdapterModule = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        if self.disable_adapters:
            replica.enable_adapters(False)
        return replica

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; no other one becomes active in its place."""
        if adapter_name in self.held_adapters:
            self.drop_adapter(adapter_name)
        self._active = [name for name in self._active if name != adapter_name]
        self.adapters_changed()

    def rename_adapter(self, old: str, new: str) -> None:
        """Rename an adapter."""
        if old in self.held_adapters:
            self.move_adapter(old, new)
        self._active = [new if name == old else name for name in self._active]
        self.adapters_changed()


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with their paths, as from ``named_modules``, without those that belong to adapters.

    So a pass over a model takes the same time however many adapters it has.
    """
    seen: set[nn.Module] = set()
    left = [("", model)]
    while left:
        path, module = left.pop()
        if module in seen:
            continue
        seen.add(module)
        yield path, module
        children = module.inner() if isinstance(module, AdapterModule) else module._modules.items()
        before = f"{path}." if path else ""
        left += [(before + name, child) for name, child in reversed(children) if child is not None]


def adapter_modules(model: nn.Module) -> list[AdapterModule]:
    """The `AdapterModule`s that `walk` finds, without their paths, which makes it faster."""
    seen: set[nn.Module] = set()
    found: list[AdapterModule] = []
    left = [model]
    while left:
        module = left.pop()
        if module in seen:
            continue
        seen.add(module)
        children: Reversible[tuple[str, nn.Module | None]] = module._modules.items()
        if isinstance(module, AdapterModule):
            found.append(module)
            children = module.inner()
        # A module without children has no adapter.
        left += [child for _, child in reversed(children) if child is not None and child._modules]
    return found


def uncompiled(model: nn.Module) -> nn.Module:
    # Not by getattr: a model passes on what it lacks to the base in it, which may be compiled.
    inner = model._modules.get("_orig_mod")
    return model if inner is None else inner


def base_of(model: nn.Module) -> nn.Module:
    """The base model inside a `PeftModel`; any other model is its own base. Neither is a compiled one."""
    inner = getattr(model, "get_base_model", None)
    found: nn.Module = inner() if callable(inner) else model
    return uncompiled(found)


class BaseTensor(NamedTuple):
    """The place of a base tensor in an adapted model.

    Attributes:
        name: Its name in the model's state dict.
        holder: The adapter module around the tensor's module, if there is one.
        attribute: Its name on its module.
    """

    name: str
    holder: AdapterModule | None
    attribute: str


def base_names(model: nn.Module) -> dict[str, BaseTensor]:
    """The base's tensors by their names in the base model without adapters.

    A shared module is listed once for each place where it is used, as in ``state_dict``.
    """
    found: dict[str, BaseTensor] = {}

    def visit(module: nn.Module, here: str, before: str, holder: AdapterModule | None = None) -> None:
        wrapper = isinstance(module, AdapterModule)
        if not wrapper:
            for name in (*module._parameters, *module._buffers):
                if getattr(module, name) is not None and name not in module._non_persistent_buffers_set:
                    found[f"{before}{name}"] = BaseTensor(f"{here}{name}", holder, name)
        for name, child in module.inner() if isinstance(module, AdapterModule) else module._modules.items():
            if child is not None:
                inside = module if isinstance(module, AdapterModule) else None
                visit(child, f"{here}{name}.", before if wrapper else f"{before}{name}.", inside)

    visit(model, "", "")
    return found


class AdapterSet:
    """The adapters of one model, over all modules that hold tensors of them.

    Args:
        model: Any module. Its `AdapterModule`s are looked up at each use, so libraries may replace modules.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def modules(self) -> list[AdapterModule]:
        return adapter_modules(self.model)

    def __contains__(self, name: object) -> bool:
        return any(name in module.held_adapters for module in self.modules())

    def names(self) -> list[str]:
        return list(dict.fromkeys(name for m in self.modules() for name in m.held_adapters))

    def active(self) -> list[str]:
        return list(dict.fromkeys(name for m in self.modules() for name in m.active_adapters))

    def check(self, names: Iterable[str], known: Iterable[str] | None = None) -> None:
        """Refuse names of adapters that do not exist.

        Raises:
            AdapterNameError: Listing the unknown names and those that exist.
        """
        present = list(known) if known is not None else self.names()
        unknown = [n for n in names if n not in present]
        if unknown:
            have = ", ".join(repr(n) for n in present) or "none"
            raise AdapterNameError(
                f"no adapter named {', '.join(map(show, unknown))}; this model has: {have}. "
                "Add one with add_adapter(name, config) or load_adapter(path, name)."
            )

    def activate(self, names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these the active adapters in all modules.

        Raises:
            AdapterNameError: If some module cannot have them active together; nothing has changed.
        """
        modules, names = self.modules(), as_names(names)
        if len(names) > 1 and (reasons := {r for m in modules if (r := m.refuses_active(names)) is not None}):
            raise AdapterNameError("; ".join(sorted(reasons)))
        for module in modules:
            module.set_adapter(names, inference_mode)

    def enable(self, enabled: bool) -> None:
        for module in self.modules():
            module.enable_adapters(enabled)

    def delete(self, name: str) -> None:
        for module in self.modules():
            module.delete_adapter(name)

    def rename(self, old: str, new: str) -> None:
        """Rename an adapter in all modules.

        Raises:
            AdapterNameError: If ``new`` is taken or unusable.
        """
        check_adapter_name(new, self)
        for module in self.modules():
            module.rename_adapter(old, new)

    def parameters(self, name: str) -> Iterator[nn.Parameter]:
        for module in self.modules():
            yield from module.adapter_parameters(name) if name in module.held_adapters else ()
