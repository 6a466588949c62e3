"""Training data: from files to batches.

``read_records`` reads records and recognises their form; ``encode``, ``encode_classification`` and
``encode_preferences`` make rows of tokens; ``pack`` joins short rows; the collators make tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...lazy import public_names

if TYPE_CHECKING:
    from .public import *  # noqa: F403
else:
    __getattr__ = public_names(__name__)
