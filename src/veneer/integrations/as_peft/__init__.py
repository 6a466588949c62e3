"""What libraries find under the name `peft`: Veneer's objects, at the import paths of PEFT.

The layout is a table (`layout.py`): `veneer_as_peft` makes a module of each row when it is imported. Names of
methods other than LoRA exist, so that importing and `isinstance` work, and raise when they are used
(`others.py`).
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

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


def fill(module: ModuleType, version: str) -> None:
    """Put the objects of its row into one module of the facade.

    Args:
        module: A module called `peft` or `peft.…`.
        version: What `peft.__version__` says.
    """
    objects = importlib.import_module(f"{__name__}.objects")
    for name in LAYOUT.get(module.__name__, ()):
        setattr(module, name, getattr(objects, name))
    if module.__name__ in ("peft", "peft.tuners", "peft.utils", "peft.utils.other"):
        others = importlib.import_module(f"{__name__}.others")
        for name in OTHER_METHODS:
            if not hasattr(module, name):
                setattr(module, name, others.stub(name))
    module.__doc__ = "Veneer, in the place of peft."
    if module.__name__ in ("peft", "peft.config"):
        module.__version__ = version  # type: ignore[attr-defined]
    module.__getattr__ = _missing(module.__name__)  # type: ignore[method-assign]


def _missing(module: str) -> Any:
    def __getattr__(name: str) -> Any:
        if _is_of_another_method(module) and name[:1].isupper():
            return importlib.import_module(f"{__name__}.others").stub(name)
        raise AttributeError(
            f"module {module!r} has no attribute {name!r}: Veneer stands in for peft here "
            "(register_as_peft), and has no object of that name"
        )

    return __getattr__
