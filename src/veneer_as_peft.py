"""`register_as_peft()`: libraries that `import peft` get Veneer.

transformers' `model.load_adapter`, Trainer's resume, TRL, diffusers, accelerate and sentence-transformers
look for a package called `peft` and for its version. Here a finder on `sys.meta_path` builds the modules
`peft` and `peft.*` from `veneer.integrations.as_peft`, and a finder of distributions answers
`importlib.metadata.version("peft")`.

Only the standard library is imported, because this may run when the interpreter starts, long before torch:
the `.pth` file of `python -m veneer.as_peft install` calls it where `VENEER_AS_PEFT=1` is set.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["after_import", "register_as_peft"]

FACADE = "veneer.integrations.as_peft"
# Methods of other libraries' models that would fail silently or leave the model half changed. By the module
# of their mixin: the mixin, the module of the facade that wraps them, and their names.
GUARDED = {
    "transformers.integrations.peft": (
        "PeftAdapterMixin",
        "mixin",
        ("load_adapter", "add_adapter", "set_adapter", "enable_adapters", "disable_adapters"),
    ),
    "diffusers.loaders.peft": (
        "PeftAdapterMixin",
        "diffusion",
        ("load_lora_adapter", "add_adapter", "delete_adapters"),
    ),
    "diffusers.loaders.lora_pipeline": ("FluxLoraLoaderMixin", "diffusion", ("load_lora_weights",)),
}
# These remember at their import whether peft is installed.
FROZEN = ("transformers.trainer_utils", "trl.trainer.utils", "diffusers")


class _RunAfter(importlib.abc.Loader):
    """A loader that runs actions once the module it loads is complete."""

    def __init__(self, loader: Any, actions: Sequence[Callable[[ModuleType], None]]) -> None:
        self._loader = loader
        self._actions = actions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Create the module with the wrapped loader."""
        created: ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, with its original loader visible to it, and run the actions."""
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        for action in tuple(self._actions):
            action(module)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds nothing itself; makes actions run after the import of the modules it knows."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Callable[[ModuleType], None]]] = {}
        self._searching: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec that the other finders return, with a loader that runs the actions."""
        if fullname not in self.actions or fullname in self._searching:
            return None
        self._searching.add(fullname)
        try:
            for finder in list(sys.meta_path):
                search = getattr(finder, "find_spec", None)
                spec = None if finder is self or search is None else search(fullname, path, target)
                if spec is not None:
                    if spec.loader is not None:
                        spec.loader = _RunAfter(spec.loader, self.actions[fullname])
                    return spec  # type: ignore[no-any-return]
        finally:
            self._searching.discard(fullname)
        return None


_after_import = _AfterImport()


def after_import(name: str, action: Callable[[ModuleType], None]) -> None:
    """Run `action(module)` as soon as the module `name` has been imported: now, if it already was.

    Args:
        name: Full name of the module, e.g. `"transformers.trainer"`. It is not imported by this call.
        action: Called once per import, so again after `importlib.reload`.
    """
    if _after_import not in sys.meta_path:
        sys.meta_path.insert(0, _after_import)
    _after_import.actions.setdefault(name, []).append(action)
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        action(module)


class _Distribution(importlib.metadata.Distribution):
    """The metadata from which a library learns which version of peft is installed."""

    def __init__(self, version: str) -> None:
        self._texts = {
            "METADATA": (
                "Metadata-Version: 2.1\nName: peft\n"
                f"Version: {version}\nSummary: Veneer, answering in the place of peft\n"
            ),
            "top_level.txt": "peft\n",
        }

    def read_text(self, filename: str | os.PathLike[str]) -> str | None:
        """The text of one of the two files of this distribution; None for any other."""
        return self._texts.get(str(filename))

    def locate_file(self, path: str | os.PathLike[str]) -> Path:
        """A path beside this module, though the distribution has no files."""
        return Path(__file__).parent / path


class _FacadeLoader(importlib.abc.Loader):
    """Creates the modules of the facade, each of them once."""

    def __init__(self, finder: _PeftFinder) -> None:
        self._finder = finder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """The module of this name if it was created before, else a new one."""
        return self._finder.modules.setdefault(spec.name, ModuleType(spec.name))

    def exec_module(self, module: ModuleType) -> None:
        """Fill the module with Veneer's objects."""
        fill: Callable[[ModuleType, str], None] = importlib.import_module(FACADE).fill
        fill(module, self._finder.version)


class _PeftFinder(importlib.metadata.DistributionFinder):
    """Answers `peft`, `peft.*`, and the distribution named peft."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.modules: dict[str, ModuleType] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """A spec for `peft` and for the modules below it that the facade has.

        Raises:
            ModuleNotFoundError: For any other module below `peft`. An installed peft is not searched: its
                modules would be mixed with Veneer's.
        """
        if fullname == "peft":
            package = True
        elif fullname.startswith("peft."):
            # The parent has been imported by now, and with it the facade and torch.
            package = importlib.import_module(FACADE).is_package(fullname)
        else:
            return None
        return importlib.util.spec_from_loader(
            fullname, _FacadeLoader(self), origin="veneer", is_package=package
        )

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterator[importlib.metadata.Distribution]:
        """The distribution of peft, when all distributions or peft itself are searched for."""
        search = {} if context is None else vars(context)
        if "path" in search:
            return
        name = search.get("name")
        if name is None or re.sub(r"[-_.]+", "-", str(name)).lower() == "peft":
            yield _Distribution(self.version)


_registered: _PeftFinder | None = None


def register_as_peft(version: str = "0.21.2") -> None:
    """Make `import peft` give Veneer in this process, from now on.

    Call it before importing transformers' Trainer, TRL or diffusers: they check once whether peft is
    installed. An installed peft that has not been imported yet is replaced. Calling this again only changes
    the version that is reported.

    Args:
        version: The version of peft to report. transformers requires at least 0.20.

    Raises:
        VeneerError: The real peft has been imported already; objects of both in one process would be mixed.
    """
    global _registered
    if _registered is not None:
        _registered.version = version
        if "peft" in sys.modules:
            sys.modules["peft"].__version__ = version  # type: ignore[attr-defined]
        return
    _refuse_or_warn()
    _registered = _PeftFinder(version)
    sys.meta_path.insert(0, _registered)
    _forget_answers()
    for name in GUARDED:
        after_import(name, _guard_mixin)


def _refuse_or_warn() -> None:
    if "peft" in sys.modules:
        from veneer.errors import VeneerError

        where = getattr(sys.modules["peft"], "__file__", None)
        raise VeneerError(
            f"register_as_peft() comes too late: peft itself has been imported ({where}). Call it before "
            "anything imports peft, start the program with `python -m veneer.as_peft script.py`, or leave "
            "it out: `from veneer import ...` works beside an imported peft."
        )
    early = [name for name in FROZEN if name in sys.modules]
    if early:
        from veneer.errors import VeneerWarning

        warnings.warn(
            f"register_as_peft() was called after {', '.join(early)} had been imported, which may already "
            "have decided whether peft is installed. Call it first, or start the program with "
            "`python -m veneer.as_peft script.py`.",
            VeneerWarning,
            stacklevel=3,
        )


def _forget_answers() -> None:
    """Clear what transformers has cached about peft."""
    import_utils = sys.modules.get("transformers.utils.import_utils")
    for name in ("is_peft_available", "is_peft_greater_or_equal", "_package_distribution_mapping"):
        clear = getattr(getattr(import_utils, name, None), "cache_clear", None)
        if clear is not None:
            clear()


def _guard_mixin(module: ModuleType) -> None:
    """Route the adapter methods of a library's models through `veneer.integrations.as_peft`."""
    mixin_name, guard, names = GUARDED[module.__name__]
    mixin = getattr(module, mixin_name)
    for name in names:
        original = getattr(mixin, name)
        if not hasattr(original, "veneer_guarded"):
            setattr(mixin, name, _guarded(guard, name, original))


def _guarded(guard: str, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        through = getattr(importlib.import_module(f"{FACADE}.{guard}"), name)
        return through(original, self, *args, **kwargs)

    method.veneer_guarded = True  # type: ignore[attr-defined]
    return method
