"""One run of a sweep: its options, its order of examples, and how far it is."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from .options import Grid, SweepOptions

T = TypeVar("T")
State = Literal["waiting", "training", "paused", "stopped", "diverged", "done"]

#: Of the runs that are compared, one in so many goes on.
KEEP = 3
#: How often runs are compared at most, the last time included.
RUNGS = 3


@dataclass
class Trial:
    """One run of a sweep.

    Attributes:
        name: Of its adapter and its directory.
        configuration: Number of its point in the grid, which its seeds share.
        values: Of the grid, by option.
        options: Of the run.
        examples: Number of examples to train on.
        steps: Of the whole run.
        rungs: The steps after which it is compared with others; the last one is the end.
        state: What happens to it.
        rung: Which of the rungs it is trained to, -1 before it begins.
        step: Steps taken.
        losses: Of each step.
        evaluations: Held-out loss at each rung that it reached.
        tokens: Computed so far, of training and of evaluation.
    """

    name: str
    configuration: int
    values: dict[str, Any]
    options: SweepOptions
    examples: int
    steps: int
    rungs: tuple[int, ...] = ()
    state: State = "waiting"
    rung: int = -1
    step: int = 0
    losses: list[float] = field(default_factory=list)
    evaluations: list[float] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=lambda: {"training": 0, "evaluation": 0})

    def batches(self, rows: Sequence[T]) -> list[list[T]]:
        """The rows of the next step, by forward pass: every epoch has an order of its own."""
        per_step = self.options.batch_size * self.options.gradient_accumulation_steps
        epoch, inside = divmod(self.step, math.ceil(len(rows) / per_step))
        order = list(range(len(rows)))
        random.Random(f"{self.options.seed} {epoch}").shuffle(order)
        chosen = [rows[i] for i in order[inside * per_step : (inside + 1) * per_step]]
        size = self.options.batch_size
        return [chosen[start : start + size] for start in range(0, len(chosen), size)]

    def seen(self, steps: int) -> int:
        """Examples in the first steps."""
        per_step = self.options.batch_size * self.options.gradient_accumulation_steps
        epochs, rest = divmod(steps, math.ceil(self.examples / per_step))
        return epochs * self.examples + min(rest * per_step, self.examples)

    @property
    def held_out(self) -> float | None:
        """The last held-out loss."""
        return self.evaluations[-1] if self.evaluations else None

    def told(self) -> str:
        """Its values, for a line."""
        return ", ".join(f"{name}={short(value)}" for name, value in self.values.items())

    def record(self) -> dict[str, Any]:
        """What `restore` needs, and whoever reads the result, as JSON."""
        return {
            "name": self.name,
            "values": self.values,
            "seed": self.options.seed,
            "state": self.state,
            "rung": self.rung,
            "step": self.step,
            "steps": self.steps,
            "evaluations": [
                {"step": step, "loss": loss} for step, loss in zip(self.rungs, self.evaluations, strict=False)
            ],
            "losses": self.losses,
            "tokens": dict(self.tokens),
        }

    def restore(self, record: dict[str, Any]) -> None:
        """Go on from `record`."""
        self.state, self.rung, self.step = record["state"], record["rung"], record["step"]
        self.losses, self.tokens = record["losses"], dict(record["tokens"])
        self.evaluations = [entry["loss"] for entry in record["evaluations"]]


def tokens_of(rows: Sequence[Any]) -> int:
    """Tokens of rows, without padding."""
    return sum(len(row["input_ids"]) for row in rows)


def steps_of(every: Iterable[Trial]) -> str:
    """How far runs are together."""
    done, steps = map(sum, zip(*((trial.step, trial.steps) for trial in every), strict=True))
    return f"{done:,} of at most {steps:,} steps"


def short(value: Any) -> str:
    """A value of a grid for a table: ``1e-4`` and not ``0.0001``."""
    if not isinstance(value, float):
        return str(value)
    if not 0 < value < 0.01:
        return f"{value:g}"
    digits, _, exponent = f"{value:e}".partition("e")
    return f"{float(digits):g}e{int(exponent)}"


def trials(options: SweepOptions, grid: Grid, examples: int) -> list[Trial]:
    """The runs of a sweep: every configuration with every seed."""
    found: list[Trial] = []
    points = options.points(grid)
    width = len(str(len(points) * options.seeds))
    for number, (values, point) in enumerate(points):
        for seed in range(options.seeds):
            own = SweepOptions(**{**vars(point), "seed": options.seed + seed})
            per_step = own.batch_size * own.gradient_accumulation_steps
            steps = own.max_steps or math.ceil(own.epochs * math.ceil(examples / per_step))
            name = f"run-{len(found) + 1:0{width}}"
            found.append(Trial(name, number, values, own, examples, steps))
    count = _rungs(len(points), min(trial.steps for trial in found)) if options.early_stop else 1
    for trial in found:
        trial.rungs = tuple(math.ceil(trial.steps / KEEP ** (count - 1 - rung)) for rung in range(count))
    return found


def _rungs(configurations: int, steps: int) -> int:
    """How often runs are compared: with few of them, or few steps, less often."""
    count = 1
    while count < RUNGS and KEEP**count <= min(configurations, steps):
        count += 1
    return count
