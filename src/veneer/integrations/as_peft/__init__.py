"""What libraries find under the name `peft`: Veneer's objects, laid out under the paths that are imported.

The layout is a table (`layout.py`) and shapes nothing else: `veneer_as_peft` makes a module of each row when
it is asked for. What belongs to other methods than LoRA exists, so that importing and `isinstance` work, and
raises when it is used (`others.py`).
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, NoReturn

from .layout import LAYOUT, OTHER_METHODS

__all__ = ["fill", "modules"]


def modules() -> dict[str, bool]:
    """The full names of the modules of the facade; true for those that have modules below them."""
    parents = {name.rpartition(".")[0] for name in LAYOUT}
    return {name: name in parents for name in LAYOUT}


def fill(module: ModuleType, version: str) -> None:
    """Put the objects of its row into one module of the facade.

    Args:
        module: A module called `peft` or `peft.…`.
        version: What `peft.__version__` says.
    """
    objects = importlib.import_module(f"{__name__}.objects")
    for name in LAYOUT[module.__name__]:
        setattr(module, name, getattr(objects, name))
    if module.__name__ in ("peft", "peft.tuners", "peft.utils", "peft.utils.other"):
        others = importlib.import_module(f"{__name__}.others")
        for name in OTHER_METHODS:
            if not hasattr(module, name):
                setattr(module, name, others.stub(name))
    module.__doc__ = "Veneer, in the place of peft."
    if module.__name__ == "peft":
        module.__version__ = version  # type: ignore[attr-defined]
    module.__getattr__ = _missing(module.__name__)  # type: ignore[method-assign]


def _missing(module: str) -> Any:
    def __getattr__(name: str) -> NoReturn:
        raise AttributeError(
            f"module {module!r} has no attribute {name!r}: Veneer stands in for peft here "
            "(register_as_peft), and has no object of that name"
        )

    return __getattr__
