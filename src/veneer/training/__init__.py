"""From data to a trained adapter: reading records, the loop (transformers' Trainer), evaluation.

Nothing here is imported by ``import veneer``; transformers and the rest of the ``train`` extra are imported
inside the functions that need them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import public_names

if TYPE_CHECKING:
    from .public import *  # noqa: F403
else:
    __getattr__ = public_names(__name__)
