"""Adapters for other readers: one file a target, and what all of them share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from veneer.lazy import public_names

if TYPE_CHECKING:
    from .public import *  # noqa: F403
else:
    __getattr__ = public_names(__name__)
