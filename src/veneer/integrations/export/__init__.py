"""Adapters for other readers: one file a target, and what all of them share."""

from __future__ import annotations

from veneer.registry import load_all

from .base import Target, targets
from .exporting import ExportReport, export_adapter

load_all(__name__, __path__)

__all__ = ["ExportReport", "Target", "export_adapter", "targets"]
