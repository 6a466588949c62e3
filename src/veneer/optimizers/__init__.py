"""Optimizers that know which parameters are A and which are B."""

from __future__ import annotations

from veneer.optimizers.lorafa import LoraFAOptimizer, create_lorafa_optimizer
from veneer.optimizers.loraplus import create_loraplus_optimizer
from veneer.optimizers.riemannian import create_riemannian_optimizer

__all__ = [
    "LoraFAOptimizer",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "create_riemannian_optimizer",
]
