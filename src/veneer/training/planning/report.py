"""What `veneer plan` tells: the plan of the targets, the estimate, and what a budget leaves."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ...config import LoraConfig
from ...errors import VeneerWarning
from ...inject.sites import plan
from ...targets import Plan, layer_index
from ..adapters import plain_targets
from .budget import Budget, Proposal, propose
from .memory import MemoryEstimate, Step, estimate_memory
from .sources import empty_model


@dataclass(frozen=True)
class PlanReport:
    """A training run that was only thought.

    Attributes:
        model: Its configuration's name or place, as given.
        architecture: transformers' class.
        dtype: Of the base's weights.
        config: The adapter.
        plan: Which modules get factors, which do not, and what matched nothing.
        step: What the estimate was made for: batch size, length and the rest.
        estimate: Memory and arithmetic.
        proposal: What a budget leaves, where one was given; then all of the above is the proposal's.
    """

    model: str
    architecture: str
    dtype: str
    config: LoraConfig
    plan: Plan
    step: Step
    estimate: MemoryEstimate
    proposal: Proposal | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.model,
            "architecture": self.architecture,
            "dtype": self.dtype,
            "lora_r": self.config.r,
            "lora_alpha": self.config.lora_alpha,
            "target_modules": plain_targets(self.config.target_modules),
            **dataclasses.asdict(self.step),
            "patterns": {
                pattern: {"modules": len(paths), "layers": layers(paths), "paths": list(paths)}
                for pattern, paths in self.plan.matched.items()
            },
            "modules_to_save": list(self.plan.modules_to_save),
            "unmatched": [dataclasses.asdict(entry) for entry in self.plan.unmatched],
            "skipped": [dataclasses.asdict(entry) for entry in self.plan.skipped],
            "estimate": self.estimate.to_dict(),
            "given_up": None if self.proposal is None else list(self.proposal.given_up),
        }


def layers(paths: Collection[str]) -> list[int]:
    """The numbers of the layers that modules lie in."""
    return sorted({index for path in paths if (index := layer_index(path)) is not None})


def plan_training(
    source: str | os.PathLike[str],
    config: LoraConfig,
    step: Step | None = None,
    *,
    budget: Budget | str | None = None,
    fixed: Collection[str] = (),
    dtype: str | None = None,
) -> PlanReport:
    """Plan a training run from a model's configuration alone.

    Args:
        source: As for `empty_model`; the adapter's task chooses the class.
        config: The adapter.
        step: How a step is taken, see `Step`.
        budget: Memory or share of the parameters to keep to.
        fixed: What a budget may not change, see `propose`.
        dtype: Of the base's weights; None or ``auto`` takes the configuration's.

    Raises:
        TrainingError: There is no such model, or nothing keeps to the budget.
        TargetError: The adapter does not fit the model; the message says all that is wrong.
        ConfigError: The budget is neither a size nor a share.
    """
    task = getattr(config.task_type, "value", config.task_type)
    model = empty_model(source, task, dtype=dtype)
    _quiet_plan(model, config)  # what cannot be placed is said before any budget is looked at
    step, proposal = Step() if step is None else step, None
    if budget is not None:
        proposal = propose(model, config, budget, step, fixed)
        config, step, estimate = proposal.config, proposal.step, proposal.estimate
    else:
        estimate = estimate_memory(model, config, step)
    return PlanReport(
        model=os.fspath(source),
        architecture=type(model).__name__,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        config=config,
        plan=_quiet_plan(model, config),
        step=step,
        estimate=estimate,
        proposal=proposal,
    )


def _quiet_plan(model: Any, config: LoraConfig) -> Plan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VeneerWarning)  # the report itself says what matches nothing
        return plan(model, config)
