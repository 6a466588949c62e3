"""Plug-ins: how they are found in a folder, and looked up by name or by the type of a module.

Defining a layer, initialisation, variant or backend registers it. The folders load every module they
contain, so adding one means adding a file. Plug-ins of other packages are loaded through their entry points,
before the first lookup.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from veneer.wording import warn

T = TypeVar("T")

#: The group of entry points through which other packages name the modules that hold their plug-ins.
PLUGINS = "veneer.plugins"


class _Plugins:
    loaded = False


def installed_plugins() -> Sequence[EntryPoint]:
    """The modules that installed packages name as plug-ins; none of them is imported."""
    return tuple(entry_points(group=PLUGINS))


def load_plugins() -> None:
    """Import the modules that installed packages name in the entry point group ``veneer.plugins``, once.

    Only installed packages are imported: the files of an adapter cannot name code. If a plug-in cannot be
    imported, a warning is given, and whatever needs it is refused by name later.
    """
    if _Plugins.loaded:
        return
    _Plugins.loaded = True
    for entry in installed_plugins():
        try:
            entry.load()
        except Exception as error:
            package = entry.dist.name if entry.dist is not None else "a package"
            warn(
                f"the plug-in {entry.name!r} ({entry.value}) of {package} could not be loaded and is left "
                f"out: {type(error).__name__}: {error}"
            )


class NameRegistry(Generic[T]):
    """Items by name.

    Args:
        kind: What the items are, for error messages ("init", "variant").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def add(self, name: str, item: T) -> None:
        """Register ``item``.

        Raises:
            ValueError: If the name is taken by another item.
        """
        if name in self._items:
            raise ValueError(f"{self.kind} {name!r} is registered twice: {self._items[name]!r} and {item!r}")
        self._items[name] = item

    def get(self, name: str) -> T | None:
        load_plugins()
        return self._items.get(name)

    def names(self) -> tuple[str, ...]:
        load_plugins()
        return tuple(sorted(self._items))

    def __iter__(self) -> Iterator[T]:
        load_plugins()
        return iter(self._items.values())


class TypeRegistry(Generic[T]):
    """Items by the types that they serve, looked up along a type's method resolution order.

    Types are given as ``"module.QualName"``, so that types of an optional library can be listed without
    importing it.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def add(self, type_names: Iterable[str], item: T) -> None:
        """Register ``item`` for each of the types.

        Raises:
            ValueError: If a type is already served by another item.
        """
        for name in type_names:
            if name in self._items:
                raise ValueError(f"two {self.kind}s for {name}: {self._items[name]!r} and {item!r}")
            self._items[name] = item

    def find(self, cls: type) -> T | None:
        """The item that serves ``cls`` or its nearest base class, or None."""
        load_plugins()
        for base in cls.__mro__:
            item = self._items.get(f"{base.__module__}.{base.__qualname__}")
            if item is not None:
                return item
        return None

    def get(self, type_name: str) -> T | None:
        return self._items.get(type_name)

    def items(self) -> Iterator[tuple[str, T]]:
        load_plugins()
        return iter(self._items.items())


def load_all(package: str, path: Iterable[str]) -> None:
    """Import every module of a package folder, in name order, so that its plug-ins register.

    Args:
        package: The package's ``__name__``.
        path: The package's ``__path__``.
    """
    for module in sorted(pkgutil.iter_modules(path), key=lambda m: m.name):
        importlib.import_module(f"{package}.{module.name}")
