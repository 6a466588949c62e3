"""The report of `veneer plan`: planned targets, estimate, and a proposal for a budget."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn

from ... import layers
from ...config import LoraConfig
from ...errors import VeneerWarning
from ...inject.sites import plan, sites
from ...module_names import around
from ...targets import Plan, layer_index
from ..adapters import plain_targets
from .budget import Proposal, propose
from .limits import Budget
from .memory import MemoryEstimate, Step, estimate_memory
from .sources import empty_model


@dataclass(frozen=True)
class LeftOut:
    """Modules, or stacks of matrices, that could be adapted and are not.

    Attributes:
        name: The end of their paths that they share.
        type_name: Their class; ``Parameter`` for stacks.
        number: How many there are.
        parameters: How many numbers they hold in all, without those of a weight that is listed before.
    """

    name: str
    type_name: str
    number: int
    parameters: int


@dataclass(frozen=True)
class PlanReport:
    """The plan of a training run.

    Attributes:
        model: Path or hub id of the model.
        architecture: transformers' class.
        dtype: Type of the base's weights.
        config: The adapter.
        plan: Which modules get factors, which do not, and what matched nothing.
        left_out: What else there is that could get factors.
        step: Batch size, length and so on.
        estimate: Memory and arithmetic.
        proposal: The proposal for a budget, if there is one; the attributes above are then the proposal's.
    """

    model: str
    architecture: str
    dtype: str
    config: LoraConfig
    plan: Plan
    step: Step
    estimate: MemoryEstimate
    proposal: Proposal | None = None
    left_out: tuple[LeftOut, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.model,
            "architecture": self.architecture,
            "dtype": self.dtype,
            "lora_r": self.config.r,
            "lora_alpha": self.config.lora_alpha,
            "target_modules": plain_targets(self.config.target_modules),
            "target_parameters": self.config.target_parameters,
            **dataclasses.asdict(self.step),
            "patterns": {
                pattern: {"modules": len(paths), "layers": layer_numbers(paths), "paths": list(paths)}
                for pattern, paths in self.plan.matched.items()
            },
            "modules_to_save": list(self.plan.modules_to_save),
            "unmatched": [dataclasses.asdict(entry) for entry in self.plan.unmatched],
            "skipped": [dataclasses.asdict(entry) for entry in self.plan.skipped],
            "left_out": [dataclasses.asdict(group) for group in self.left_out],
            "estimate": self.estimate.to_dict(),
            "given_up": None if self.proposal is None else list(self.proposal.given_up),
        }


def layer_numbers(paths: Collection[str]) -> list[int]:
    """The numbers of the layers that contain modules."""
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
        step: Settings of a step.
        budget: A limit for memory or for the share of trainable parameters.
        fixed: Settings that a budget does not change, see `propose`.
        dtype: Type of the base's weights; the configuration's if None or ``auto``.

    Raises:
        TrainingError: There is no such model, or no settings are within the budget.
        TargetError: The adapter does not fit the model; lists everything that is wrong.
        ConfigError: The budget is neither a size nor a share.
    """
    task = getattr(config.task_type, "value", config.task_type)
    model = empty_model(source, task, dtype=dtype)
    _quiet_plan(model, config)  # bad targets are refused before the budget
    step, proposal = Step() if step is None else step, None
    if budget is not None:
        proposal = propose(model, config, budget, step, fixed)
        config, step, estimate = proposal.config, proposal.step, proposal.estimate
    else:
        estimate = estimate_memory(model, config, step)
    chosen = _quiet_plan(model, config)
    return PlanReport(
        model=os.fspath(source),
        architecture=type(model).__name__,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        config=config,
        plan=chosen,
        step=step,
        estimate=estimate,
        proposal=proposal,
        left_out=left_out(model, chosen),
    )


def left_out(model: nn.Module, chosen: Plan) -> tuple[LeftOut, ...]:
    """What a plan leaves as it is of a model's layers and stacks, by name and type, the largest first."""
    taken = {spec.path for spec in chosen.specs} | {*chosen.modules_to_save}
    sizes: dict[tuple[str, str], list[int]] = {}
    counted: set[nn.Parameter] = set()

    def numbers(parameter: nn.Parameter) -> int:
        if parameter in counted:
            return 0  # of a head, say, that shares the embedding's weight
        counted.add(parameter)
        return parameter.numel()

    for path, site in sites(model).items():
        if around(path, taken):
            continue
        own = {name: p for name, p in site.base._parameters.items() if p is not None}
        name = path.rpartition(".")[2]
        if layers.find(site.base) is not None:
            sizes.setdefault((name, type(site.base).__name__), []).append(sum(map(numbers, own.values())))
            continue
        for part, parameter in own.items():
            if parameter.dim() in (2, 3) and f"{path}.{part}" not in taken:
                sizes.setdefault((f"{name}.{part}", "Parameter"), []).append(numbers(parameter))
    groups = [LeftOut(*key, len(counts), sum(counts)) for key, counts in sizes.items()]
    return tuple(sorted(groups, key=lambda group: -group.parameters))


def _quiet_plan(model: Any, config: LoraConfig) -> Plan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VeneerWarning)  # the report itself lists what matches nothing
        return plan(model, config)
