"""The public names of the package; its own docstring says what it is for."""

from __future__ import annotations

from .budget import Proposal, propose
from .limits import Budget, parse_budget
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
