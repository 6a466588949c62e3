"""Packages whose public names are loaded when one of them is used."""

from __future__ import annotations

import dis
import importlib
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def is_from_import(frame: FrameType) -> bool:
    """Whether a frame is at an import of the form ``from module import name``.

    Of an `AttributeError` Python then says only that the name cannot be imported; an `ImportError` is shown.
    """
    return frame.f_code.co_code[frame.f_lasti] == dis.opmap["IMPORT_FROM"]


def public_names(package: str) -> Callable[[str], Any]:
    """The ``__getattr__`` (PEP 562) of a package whose public names are defined in its module ``public``.

    The first use of a name loads them all. Until then, a module of the package can be imported without the
    dependencies of the others, such as torch.
    """

    def find(name: str) -> Any:
        # The import system looks up other dunder names on every package.
        if not name.startswith("__") or name == "__all__":
            public = importlib.import_module(f"{package}.public")
            found = {"__all__": public.__all__, **{each: getattr(public, each) for each in public.__all__}}
            if name in found:
                vars(sys.modules[package]).update(found)
                return found[name]
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find
