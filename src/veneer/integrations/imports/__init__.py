"""Adapters of other writers: their names, and what becomes of them in PEFT's format."""

from __future__ import annotations

from .importing import ImportReport, import_adapter

__all__ = ["ImportReport", "import_adapter"]
