"""Converting adapters of diffusers and kohya's sd-scripts to PEFT's format."""

from __future__ import annotations

from .importing import ImportReport, import_adapter

__all__ = ["ImportReport", "import_adapter"]
