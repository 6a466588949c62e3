"""The public names of the package; its own docstring says what it is for."""

from __future__ import annotations

from pathlib import Path

from veneer.registry import load_all

from .base import Target, targets
from .exporting import ExportReport, export_adapter

load_all(__package__, [str(Path(__file__).parent)])

__all__ = ["ExportReport", "Target", "export_adapter", "targets"]
