"""The adapters of a model: what one module answers for, and the index over all of them.

An `AdapterModule` is a module in the model that holds something of one or more adapters: a
low-ranked layer, or the trained copy of a whole module. It owns which of its adapters are active.
`AdapterSet` is the model-level view: it finds those modules and applies one verb to all of them.
Modules may disagree (callers such as diffusion pipelines set each layer by itself); the view then
says so instead of correcting them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Reversible, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from veneer.errors import AdapterNameError, show


def check_adapter_name(name: str) -> None:
    """Refuse what cannot be a module name or a directory name.

    Raises:
        AdapterNameError: If the name is empty, holds a dot or a path separator, or hides a method
            of the containers that adapters live in.
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


def as_names(names: str | Sequence[str]) -> list[str]:
    """One name or several, as a list without repetitions, in order."""
    if isinstance(names, str):
        return [names]
    return list(names) if len(names) < 2 else list(dict.fromkeys(names))


_BLANK = vars(nn.Module())
_KNOWN = all(isinstance(value, dict | set | bool | None) for value in _BLANK.values())


def begin(module: nn.Module) -> None:
    """What ``nn.Module.__init__`` does, in half the time: wrapping a model makes modules by the thousand."""
    if not _KNOWN:  # a torch that keeps something else in its modules
        nn.Module.__init__(module)
        return
    state = module.__dict__
    for name, value in _BLANK.items():
        state[name] = value.copy() if isinstance(value, dict | set) else value


class Contexts(threading.local):
    """The contexts in which the present thread has a model's adapters disabled; one for all its modules.

    A copy of the model begins without any.
    """

    def __init__(self) -> None:
        #: A list of its own for each thread. Compilers guard on its length.
        self.open: list[_Context] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Contexts:
        return Contexts()

    def __reduce__(self) -> tuple[type[Contexts], tuple[()]]:
        return Contexts, ()

    def hold(self) -> bool:
        """Whether adapters are disabled in what is computed now.

        A backward computes parts of earlier calls again, so in one only contexts count that it opened itself.
        """
        if not self.open:
            return False
        return torch.compiler.is_compiling() or any(c.backward == _backward() for c in self.open)


class _Context:
    def __init__(self) -> None:
        self.backward = _backward()


#: A number for the backward that this thread is in, -1 for none.
_backward = torch._C._current_graph_task_id


@contextmanager
def opened(everywhere: Iterable[Contexts]) -> Iterator[None]:
    """A context of the thread that opens it. Contexts may end in any order, and in another thread."""
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
    """A module that holds a part of one or more adapters.

    Subclasses say what they hold (`adapter_names`), which parameters belong to an adapter
    (`adapter_parameters`), and how to forget or rename one.

    Args:
        **state: Attributes to begin with that are neither tensors nor modules.
    """

    _active: list[str]
    #: Switched off for every thread, until switched on again.
    _disabled: bool
    _contexts: Contexts

    def __init__(self, **state: Any) -> None:
        begin(self)
        # Past `nn.Module.__setattr__`, which looks for tensors and modules: models have hundreds of these.
        self.__dict__.update(_active=[], _disabled=False, _contexts=Contexts(), **state)

    # -- what a subclass says ------------------------------------------------------------------

    @property
    def held_adapters(self) -> tuple[str, ...]:
        """Names of the adapters that this module holds a part of."""
        raise NotImplementedError

    def adapter_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """The parameters of one adapter in this module."""
        raise NotImplementedError

    def drop_adapter(self, name: str) -> None:
        """Forget the adapter's tensors."""
        raise NotImplementedError

    def move_adapter(self, old: str, new: str) -> None:
        """Keep the adapter's tensors under another name."""
        raise NotImplementedError

    @property
    def tied_adapter(self) -> AdapterModule | None:
        """The module whose tensors this one uses, for one that has none of its own."""
        return None

    def refuses_active(self, names: Sequence[str]) -> str | None:
        """Why these adapters cannot be active together here, or None."""
        return None

    def refuses_rows(self, names: Sequence[str]) -> str | None:
        """Why rows of one batch cannot go through these adapters here, or None."""
        return None

    def adapters_changed(self) -> None:
        """Called after every change of what is active, enabled or held."""

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters that are in the base's tensors now; none where nothing merges."""
        return []

    def base_device(self) -> torch.device:
        """Where an adapter's parameters belong: where the base's are."""
        parameters = (p for _, child in self.inner() if child is not None for p in child.parameters())
        return next((p.device for p in parameters), torch.device("cpu"))

    def inner(self) -> Reversible[tuple[str, nn.Module | None]]:
        """The children, by name, that belong to the model rather than to an adapter."""
        return self._modules.items()

    # -- the verbs ---------------------------------------------------------------------------------

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters; they may include adapters that this module does not hold."""
        return list(self._active)

    @property
    def active_adapter(self) -> list[str]:
        """The same as `active_adapters`: the field's singular spelling."""
        return list(self._active)

    @property
    def disable_adapters(self) -> bool:
        """True while the module computes what the base model computes, for the thread that asks."""
        return self._disabled or self._contexts.hold()

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones, trainable unless ``inference_mode``; freeze those that were.

        Args:
            adapter_names: One name or several. Names that this module does not hold are kept:
                another module may hold them.
            inference_mode: Leave the activated parameters frozen.
        """
        before, names = self._active, as_names(adapter_names)
        self.__dict__["_active"] = names
        for name in self.held_adapters:
            active = name in names
            if not active and name not in before:
                continue  # frozen when it was added, or when it was no longer active
            trainable = active and not inference_mode
            for parameter in self.adapter_parameters(name):
                # Quantised or integer parameters cannot require a gradient.
                if parameter.requires_grad is not trainable and (
                    not trainable or parameter.is_floating_point()
                ):
                    parameter.requires_grad = trainable
        self.adapters_changed()

    def set_strength(self, adapter_name: str, factor: float) -> None:
        """Let an adapter count ``factor`` times as much as configured, where that has a meaning."""

    def copying(self, old: str, new: str) -> Callable[[], None]:
        """A call that gives this module an adapter ``new`` with copies of the tensors of ``old``, not active.

        The copies are made before the call.
        """
        raise NotImplementedError

    def copy_adapter(self, old: str, new: str) -> None:
        """Give this module an adapter ``new`` with copies of the tensors of ``old``; it is not active."""
        self.copying(old, new)()

    def note_active(self, names: Sequence[str]) -> None:
        """Take over what is active in the model, without touching what is trainable."""
        self._active = as_names(names)
        self.adapters_changed()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters of this module on or off; what is active stays noted."""
        self._disabled = not enabled
        self.adapters_changed()

    def _replicate_for_data_parallel(self) -> AdapterModule:
        """A copy that is called in a thread of its own: it sees what this one does."""
        replica: AdapterModule = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        if self.disable_adapters:
            replica.enable_adapters(False)
        return replica

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; no other one becomes active in its place."""
        if adapter_name in self.held_adapters:
            self.drop_adapter(adapter_name)
        self._active = [name for name in self._active if name != adapter_name]
        self.adapters_changed()

    def rename_adapter(self, old: str, new: str) -> None:
        """Call an adapter by another name."""
        if old in self.held_adapters:
            self.move_adapter(old, new)
        self._active = [new if name == old else name for name in self._active]
        self.adapters_changed()


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with their paths, as ``named_modules`` gives them, but not what adapters hold.

    So a pass over a model costs what its own modules do, however many adapters are in them.
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
    """The `AdapterModule`s that `walk` meets, without their paths: every verb begins with this."""
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
        # What has no children holds no adapter.
        left += [child for _, child in reversed(children) if child is not None and child._modules]
    return found


def base_of(model: nn.Module) -> nn.Module:
    """The base model inside a face such as `PeftModel`; the model itself where there is none."""
    inner = getattr(model, "get_base_model", None)
    found: nn.Module = inner() if callable(inner) else model
    return found


class BaseTensor(NamedTuple):
    """Where a tensor of the base is in an adapted model.

    Attributes:
        name: In the model's state dict.
        holder: The adapter module around the tensor's module, if there is one.
        attribute: Its name on its module.
    """

    name: str
    holder: AdapterModule | None
    attribute: str


def base_names(model: nn.Module) -> dict[str, BaseTensor]:
    """The base's tensors by what they are called without any adapter.

    A shared module is named once for each place that it stands in, as ``state_dict`` does.
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
    """The adapters of one model, over all the modules that hold a part of them.

    Args:
        model: Any module; its `AdapterModule` descendants are looked up at each use, so the view
            never goes stale when a library replaces modules.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def modules(self) -> list[AdapterModule]:
        """The adapter modules, in model order."""
        return adapter_modules(self.model)

    def names(self) -> list[str]:
        """Names of all adapters that some module holds, in order of appearance."""
        return list(dict.fromkeys(name for m in self.modules() for name in m.held_adapters))

    def active(self) -> list[str]:
        """Names of the active adapters: the union over the modules, in order of appearance."""
        return list(dict.fromkeys(name for m in self.modules() for name in m.active_adapters))

    def check(self, names: Iterable[str], known: Iterable[str] | None = None) -> None:
        """Refuse names that no module holds.

        Raises:
            AdapterNameError: Naming the unknown ones and those that exist.
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
        """Make these adapters the active ones everywhere.

        Raises:
            AdapterNameError: If some module cannot have them active together. Nothing has changed then.
        """
        modules, names = self.modules(), as_names(names)
        if reasons := {r for m in modules if (r := m.refuses_active(names)) is not None}:
            raise AdapterNameError("; ".join(sorted(reasons)))
        for module in modules:
            module.set_adapter(names, inference_mode)

    def enable(self, enabled: bool) -> None:
        """Switch adapters on or off everywhere."""
        for module in self.modules():
            module.enable_adapters(enabled)

    def delete(self, name: str) -> None:
        """Forget an adapter everywhere."""
        for module in self.modules():
            module.delete_adapter(name)

    def rename(self, old: str, new: str) -> None:
        """Rename an adapter everywhere.

        Raises:
            AdapterNameError: If ``new`` is taken or unusable.
        """
        check_adapter_name(new)
        if new in self.names():
            raise AdapterNameError(
                f"an adapter named {new!r} exists already; delete it or choose another name"
            )
        for module in self.modules():
            module.rename_adapter(old, new)

    def parameters(self, name: str) -> Iterator[nn.Parameter]:
        """All parameters of one adapter."""
        for module in self.modules():
            yield from module.adapter_parameters(name) if name in module.held_adapters else ()
