"""What libraries find under the name `peft`: Veneer's objects, at the import paths of PEFT.

The layout is a table (`layout.py`): `veneer_as_peft` makes a module of each row when it is imported. Names of
methods other than LoRA exist, so that importing and `isinstance` work, and raise when they are used
(`others.py`).
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from ...lazy import is_from_import
from .layout import LAYOUT, OTHER_METHODS, OTHER_MODULES, OTHER_PACKAGES

__all__ = ["fill", "is_package"]

_PARENTS = {name.rpartition(".")[0] for name in LAYOUT}


def is_package(module: str) -> bool:
    """Whether a module of the facade has modules below it.

    Args:
        module: Its full name, `peft.…`.

    Raises:
        ModuleNotFoundError: The facade has no such module.
    """
    other = _is_of_another_method(module)
    if module in LAYOUT or other:
        return module in _PARENTS or (other and module.count(".") == 2)
    raise ModuleNotFoundError(
        f"No module named {module!r}: Veneer stands in for peft here (register_as_peft, "
        "`python -m veneer.as_peft` or VENEER_AS_PEFT=1), and lays out what libraries and guides import of "
        "it. Look for the name in `veneer` itself, or run this program with the real peft.",
        name=module,
    )


def _is_of_another_method(module: str) -> bool:
    package, _, inside = module.removeprefix("peft.tuners.").partition(".")
    return module.startswith("peft.tuners.") and package in OTHER_PACKAGES and inside in ("", *OTHER_MODULES)


def fill(module: ModuleType, version: str = "") -> None:
    """Put the objects of its row into one module of the facade.

    Args:
        module: A module called `peft` or `peft.…`, or `veneer.…` for a row of the same name.
        version: What `peft.__version__` says.
    """
    objects = importlib.import_module(f"{__name__}.objects")
    for name in LAYOUT.get(_row(module), ()):
        setattr(module, name, getattr(objects, name))
    if _row(module) in ("peft", "peft.tuners", "peft.utils", "peft.utils.other"):
        others = importlib.import_module(f"{__name__}.others")
        for name in OTHER_METHODS:
            if not hasattr(module, name):
                setattr(module, name, others.stub(name))
    module.__doc__ = f"Veneer's objects under the names of {_row(module)}."
    if module.__name__ in ("peft", "peft.config"):
        module.__version__ = version  # type: ignore[attr-defined]
    module.__getattr__ = names_of(module)  # type: ignore[method-assign]


def _row(module: ModuleType) -> str:
    return "peft" + module.__name__.removeprefix("peft").removeprefix("veneer")


def names_of(module: ModuleType) -> Any:
    """The ``__getattr__`` of a module: names of its row, and what to say of all others."""
    row = _row(module)
    stands_in = "stands in for peft here (register_as_peft), and " if module.__name__ == row else ""

    def __getattr__(name: str) -> Any:
        if name == "__version__" and module.__name__ == "veneer.config":
            return sys.modules["veneer"].__version__
        if name in LAYOUT.get(row, ()):
            return getattr(importlib.import_module(f"{__name__}.objects"), name)
        if _is_of_another_method(row) and name[:1].isupper():
            return importlib.import_module(f"{__name__}.others").stub(name)
        text = f"module {module.__name__!r} has no attribute {name!r}: Veneer {stands_in}has no such object"
        if is_from_import(sys._getframe(1)):
            raise ImportError(text, name=name)
        raise AttributeError(text)

    return __getattr__
