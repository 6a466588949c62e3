"""Let libraries that `import peft` themselves get Veneer: `register_as_peft()`.

transformers' `model.load_adapter`, Trainer's resume, TRL, diffusers, accelerate and sentence-transformers
look for a package called `peft` and ask for its version. This module answers both questions: a finder on
`sys.meta_path` builds the modules `peft` and `peft.*` from `veneer.integrations.as_peft`, and a finder of
distributions answers `importlib.metadata.version("peft")`.

It imports nothing but the standard library, because it may run when the interpreter starts, long before
torch: a `.pth` line that `python -m veneer.as_peft install` writes calls it where `VENEER_AS_PEFT=1` is set.
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
# Methods of other libraries' models that would go wrong in silence, or leave the model half changed: by the
# module of their mixin, which module of the facade they go through, and their names.
GUARDED = {
    "transformers.integrations.peft": (
        "mixin",
        ("load_adapter", "add_adapter", "set_adapter", "enable_adapters", "disable_adapters"),
    ),
    "diffusers.loaders.peft": ("diffusion", ("load_lora_adapter", "add_adapter", "delete_adapters")),
}
# Whoever was imported earlier has asked whether peft is there, and remembers the answer.
FROZEN = ("transformers.trainer_utils", "trl.trainer.utils", "diffusers")


class _RunAfter(importlib.abc.Loader):
    """A loader that runs actions once the module it loads is complete."""

    def __init__(self, loader: Any, actions: Sequence[Callable[[ModuleType], None]]) -> None:
        self._loader = loader
        self._actions = actions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Whatever the wrapped loader creates."""
        made: ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        """Load the module, with its own loader visible from inside, then run the actions."""
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        for action in tuple(self._actions):
            action(module)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds nothing itself; hooks an action behind the import of the modules it knows."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Callable[[ModuleType], None]]] = {}
        self._searching: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """What the other finders find, with the actions hooked behind it."""
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
        action: Called once an import; it must bear being called again after `importlib.reload`.
    """
    if _after_import not in sys.meta_path:
        sys.meta_path.insert(0, _after_import)
    _after_import.actions.setdefault(name, []).append(action)
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        action(module)


class _Distribution(importlib.metadata.Distribution):
    """The metadata that a library reads to learn which peft is installed."""

    def __init__(self, version: str) -> None:
        self._texts = {
            "METADATA": (
                "Metadata-Version: 2.1\nName: peft\n"
                f"Version: {version}\nSummary: Veneer, answering in the place of peft\n"
            ),
            "top_level.txt": "peft\n",
        }

    def read_text(self, filename: str | os.PathLike[str]) -> str | None:
        """One of the two files that are asked for; None for any other."""
        return self._texts.get(str(filename))

    def locate_file(self, path: str | os.PathLike[str]) -> Path:
        """Files of this distribution do not exist; a path relative to this module is as good as any."""
        return Path(__file__).parent / path


class _FacadeLoader(importlib.abc.Loader):
    """Makes one module of the facade; the same object each time."""

    def __init__(self, finder: _PeftFinder) -> None:
        self._finder = finder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """The module made earlier under this name, or a fresh one."""
        return self._finder.modules.setdefault(spec.name, ModuleType(spec.name))

    def exec_module(self, module: ModuleType) -> None:
        """Lay out Veneer's objects in the module."""
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
        """A spec for `peft` and for the modules below it that the facade lays out.

        Raises:
            ModuleNotFoundError: For another module below `peft`. Whatever is installed is not looked for:
                it would be the real peft's, beside Veneer's.
        """
        if fullname == "peft":
            package = True
        elif fullname.startswith("peft."):
            # The parent has been imported by now, so the facade (and torch) are there already.
            package = importlib.import_module(FACADE).is_package(fullname)
        else:
            return None
        return importlib.util.spec_from_loader(
            fullname, _FacadeLoader(self), origin="veneer", is_package=package
        )

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterator[importlib.metadata.Distribution]:
        """The one distribution, where everything installed is asked for, or peft by name."""
        asked = {} if context is None else vars(context)
        if "path" in asked:
            return
        name = asked.get("name")
        if name is None or re.sub(r"[-_.]+", "-", str(name)).lower() == "peft":
            yield _Distribution(self.version)


_registered: _PeftFinder | None = None


def register_as_peft(version: str = "0.21.2") -> None:
    """From now on `import peft` gives Veneer, in this process.

    Call it before transformers' Trainer, TRL or diffusers are imported: they ask once whether peft is there.
    Where the real peft is installed but not imported yet, Veneer takes its place. Calling it again only
    changes the version that is reported.

    Args:
        version: The version of peft whose interface is claimed. transformers asks for at least 0.20.

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
            f"register_as_peft() was called after {', '.join(early)} had been imported; what was imported "
            "has decided already whether peft exists, and may go on with that answer. Call it first, or "
            "start the program with `python -m veneer.as_peft script.py`.",
            VeneerWarning,
            stacklevel=3,
        )


def _forget_answers() -> None:
    """Clear what transformers has cached about peft, if it has asked already."""
    questions = sys.modules.get("transformers.utils.import_utils")
    for name in ("is_peft_available", "is_peft_greater_or_equal", "_package_distribution_mapping"):
        clear = getattr(getattr(questions, name, None), "cache_clear", None)
        if clear is not None:
            clear()


def _guard_mixin(module: ModuleType) -> None:
    """Have the adapter methods of a library's models go through `veneer.integrations.as_peft`."""
    mixin = module.PeftAdapterMixin
    guard, names = GUARDED[module.__name__]
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
