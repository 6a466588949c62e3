"""How the base weight of a layer is stored: one file a storage."""

from __future__ import annotations

from veneer.backends.base import Backend, find
from veneer.registry import load_all

load_all(__name__, __path__)

__all__ = ["Backend", "find"]
