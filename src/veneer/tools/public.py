"""The public names of the package; its own docstring says what it is for."""

from __future__ import annotations

from .resizing import Resized, ResizeReport, resize_adapter

__all__ = ["ResizeReport", "Resized", "resize_adapter"]
