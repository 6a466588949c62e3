"""Many adapters trained on one base in one pass."""

from __future__ import annotations

from veneer.family.family import Family
from veneer.family.losses import Result
from veneer.family.sampling import Sample
from veneer.family.trainee import Step

__all__ = ["Family", "Result", "Sample", "Step"]
