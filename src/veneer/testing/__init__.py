"""The laws that every layer, initialisation, variant and backend obeys, to check plug-ins against."""

from __future__ import annotations

from veneer.testing.checking import CASES, LawBroken, Report, check
from veneer.testing.laws import LAWS, Law
from veneer.testing.made import LayerCase, Made, train
from veneer.testing.registering import registered_for_now

__all__ = [
    "CASES",
    "LAWS",
    "Law",
    "LawBroken",
    "LayerCase",
    "Made",
    "Report",
    "check",
    "registered_for_now",
    "train",
]
