"""Initialisations of the factors, one per file."""

from __future__ import annotations

from veneer.inits.base import (
    Init,
    InitRequest,
    InitResult,
    find,
    folded,
    forget_statistics,
    note_statistics,
    statistics_of,
)
from veneer.registry import load_all

load_all(__name__, __path__)

__all__ = [
    "Init",
    "InitRequest",
    "InitResult",
    "find",
    "folded",
    "forget_statistics",
    "note_statistics",
    "statistics_of",
]
