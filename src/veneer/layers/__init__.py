"""How a type of module is low-ranked: one file a geometry."""

from __future__ import annotations

from torch import nn

from veneer.layers.base import Factor, LoraLayer, registry
from veneer.layers.making import wrap
from veneer.layers.refused import REFUSED, refusal
from veneer.registry import load_all

load_all(__name__, __path__)


def find(module: nn.Module) -> type[LoraLayer] | None:
    """The layer class that adapts such a module, or None."""
    return registry.find(type(module))


__all__ = ["REFUSED", "Factor", "LoraLayer", "find", "refusal", "registry", "wrap"]
