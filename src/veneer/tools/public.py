"""The public names of the package; its own docstring says what it is for."""

from __future__ import annotations

from .check import Check
from .combining import combine_adapters
from .comparing import AdapterDifference, Angles, ModuleDifference, compare_adapters
from .converting import ConvertReport, convert_adapter
from .extract_report import Extracted, ExtractReport, LeftOut
from .extracting import extract_adapter
from .resizing import Resized, ResizeReport, resize_adapter
from .verifying import verify_adapter

__all__ = [
    "AdapterDifference",
    "Angles",
    "Check",
    "ConvertReport",
    "ExtractReport",
    "Extracted",
    "LeftOut",
    "ModuleDifference",
    "ResizeReport",
    "Resized",
    "combine_adapters",
    "compare_adapters",
    "convert_adapter",
    "extract_adapter",
    "resize_adapter",
    "verify_adapter",
]
