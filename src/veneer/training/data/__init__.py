"""Data: reading records, recognising their form, tokens and labels, packing, batches.

``read_records`` gives records of one known form; ``encode``, ``encode_classification`` and
``encode_preferences`` make of them what is trained on; ``pack`` lays examples together; the collators make
tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...lazy import public_names

if TYPE_CHECKING:
    from .public import *  # noqa: F403
else:
    __getattr__ = public_names(__name__)
