"""Converting adapters of diffusers and kohya's sd-scripts to PEFT's format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from veneer.lazy import public_names

if TYPE_CHECKING:
    from .public import *  # noqa: F403
else:
    __getattr__ = public_names(__name__)
