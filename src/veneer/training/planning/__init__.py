"""What a training run would do and need, from the model's configuration alone."""

from __future__ import annotations

from .budget import Budget, Proposal, parse_budget, propose
from .memory import MemoryEstimate, Step, estimate_memory, optimizer_bytes, seconds_per_step
from .report import PlanReport, plan_training
from .sources import empty_model, shadow

__all__ = [
    "Budget",
    "MemoryEstimate",
    "PlanReport",
    "Proposal",
    "Step",
    "empty_model",
    "estimate_memory",
    "optimizer_bytes",
    "parse_budget",
    "plan_training",
    "propose",
    "seconds_per_step",
    "shadow",
]
