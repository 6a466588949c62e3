"""Packages whose public names are loaded when one of them is used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any


def public_names(package: str) -> Callable[[str], Any]:
    """The ``__getattr__`` (PEP 562) of a package whose public names stand in its module ``public``.

    They come all together with the first that is asked for. So a module of the package can be imported
    without what the others need, which for most is torch.
    """

    def find(name: str) -> Any:
        if not name.startswith("__") or name == "__all__":  # the import system asks every package for some
            public = importlib.import_module(f"{package}.public")
            found = {"__all__": public.__all__, **{each: getattr(public, each) for each in public.__all__}}
            if name in found:
                vars(sys.modules[package]).update(found)
                return found[name]
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find
