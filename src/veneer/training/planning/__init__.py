"""What a training run would do and need, from the model's configuration alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...lazy import public_names

if TYPE_CHECKING:
    from .public import *  # noqa: F403
else:
    __getattr__ = public_names(__name__)
