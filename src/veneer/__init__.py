"""Veneer: low-rank adaptation (LoRA) of PyTorch models.

The names are PEFT's: ``from veneer import LoraConfig, get_peft_model, PeftModel``.
Importing this package imports nothing heavy: the first public name brings torch and safetensors, and nothing
else that is heavy. So the command line answers at once, Ctrl-C included.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from typing import TYPE_CHECKING, Any

from veneer import integrations
from veneer.lazy import is_from_import

if TYPE_CHECKING:
    from veneer.public import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in {unit.name for unit in pkgutil.iter_modules(__path__)}:  # noqa: F405
        return importlib.import_module(f"{__name__}.{name}")
    hidden = name.startswith("__") and name != "__all__"  # what the import system asks of every module
    if hidden:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = globals()[name] = getattr(importlib.import_module("veneer.public"), name)
    except AttributeError as error:
        if is_from_import(sys._getframe(1)):
            raise ImportError(str(error), name=name) from None
        raise
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})


integrations.watch()  # last: what it meets may ask for a public name at once
