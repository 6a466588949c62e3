"""LoRA layers for the types of modules: one file per geometry."""

from __future__ import annotations

from veneer.layers.factor import Factor
from veneer.layers.layer import LoraLayer, find, registry
from veneer.layers.making import wrap
from veneer.layers.refused import REFUSED, reader, refusal
from veneer.registry import load_all

load_all(__name__, __path__)

__all__ = ["REFUSED", "Factor", "LoraLayer", "find", "reader", "refusal", "registry", "wrap"]
