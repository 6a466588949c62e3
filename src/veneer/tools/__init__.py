"""Tools for saved adapters: change their rank, compare them, add them up; from files, module by module.

Nothing here is imported by ``import veneer``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import public_names

if TYPE_CHECKING:
    from .public import *  # noqa: F403
else:
    __getattr__ = public_names(__name__)
