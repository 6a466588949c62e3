"""Packs: as many runs as fit into memory at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import Hint, TrainingError
from ..training.loading import ROOM, accelerators, free_bytes
from ..training.planning import Step, empty_model, estimate_memory
from ..training.planning.budget import SPARE
from ..training.planning.limits import out_of_memory, parse_budget
from .options import SweepOptions
from .trial import Trial


class Packs:
    """What runs take, and what they may take together.

    Args:
        costs: Bytes of each run beside the base.
        room: Bytes for all of them.
    """

    def __init__(self, costs: dict[str, int], room: int) -> None:
        self.costs, self.room = costs, room

    def fit(self, names: Sequence[str]) -> bool:
        """Whether runs may be in memory together."""
        return sum(self.costs[name] for name in names) <= self.room

    def first(self, names: Sequence[str]) -> list[str]:
        """The first runs that fit together, at least one."""
        count = 1
        while count < len(names) and self.fit(names[: count + 1]):
            count += 1
        return list(names[:count])

    def halve(self, pack: Sequence[str], error: BaseException) -> None:
        """Make packs half as large as one that did not fit.

        Raises:
            TrainingError: It was a single run.
            BaseException: The error, if it is about something else.
        """
        if not out_of_memory(error):
            raise error
        if len(pack) == 1:
            raise TrainingError(
                f"out of memory with {pack[0]} alone. Less is taken by a smaller ",
                Hint("batch_size"),
                " or ",
                Hint("max_length"),
                ", or with ",
                Hint("gradient_checkpointing", True),
            ) from error
        self.room = sum(self.costs[name] for name in pack) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def packs(base: Any, trials: Sequence[Trial], length: int, options: SweepOptions, share: int = 1) -> Packs:
    """What each run of a sweep takes by the planner, and what there is.

    Args:
        base: The model.
        trials: The runs.
        length: Of the longest row, in tokens.
        options: With the memory to use.
        share: Processes that share what is free.

    Raises:
        TargetError: The adapter of a run does not fit the base.
        TrainingError: The base and one run need more than ``memory``.
    """
    there = accelerators()
    model = empty_model(options.model, options.task_type) if options.quantize else base
    known: dict[str, tuple[int, int]] = {}
    costs = {}
    for trial in trials:
        own = trial.options
        step = Step.of(own, sequence_length=length, device="cuda" if there else "cpu")
        config = own.lora_config()
        key = f"{config.to_dict()} {step}"
        if key not in known:
            found = estimate_memory(model, config, step)
            known[key] = (found.base, found.peak - found.base)
        taken, costs[trial.name] = known[key]
    if options.memory is None:
        free = free_bytes(there[0]) if there else None
        return Packs(costs, int(ROOM * (_free_memory() if free is None else free) / share))
    room = int((parse_budget(options.memory).memory or 0) * (1 - SPARE)) - taken
    largest = max(costs.values())
    if room < largest:
        raise TrainingError(
            Hint("memory", options.memory),
            f" is too little, of which 5 % stay free: the base takes {taken / 1e9:.2g} GB and a run up to "
            f"{largest / 1e9:.2g} GB",
        )
    return Packs(costs, room)


def _free_memory() -> int:
    import psutil  # accelerate requires it

    return int(psutil.virtual_memory().available)
