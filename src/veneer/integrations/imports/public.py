"""The public names of the package; its own docstring says what it is for."""

from __future__ import annotations

from .importing import ImportReport, import_adapter

__all__ = ["ImportReport", "import_adapter"]
