"""How the low-rank update combines with the base weight: one file a variant."""

from __future__ import annotations

from veneer.registry import load_all
from veneer.variants.base import Branch, ParameterRequest, Variant, get, registry, scaled_branch

load_all(__name__, __path__)

__all__ = ["Branch", "ParameterRequest", "Variant", "get", "registry", "scaled_branch"]
