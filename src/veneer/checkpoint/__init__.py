"""Adapters on disk: a directory <-> (configuration, tensors), and what of a file fits a model.

Everything here works on ``dict[str, Tensor]`` and directories; nothing knows modules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..doors import public_names

if TYPE_CHECKING:
    from .public import *  # noqa: F403
else:
    __getattr__ = public_names(__name__)
