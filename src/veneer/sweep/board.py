"""The runs of a sweep while they are trained: a table that lives on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..training.progress import Progress, Terminal
from .trial import Trial, short

if TYPE_CHECKING:
    from rich.table import Table

#: Seconds between two lines about the steps, where there is no table.
LINE_SECONDS = 30.0
#: Which runs come first in a table that is too long for the terminal.
ORDER = ("training", "done", "paused", "waiting", "stopped", "diverged")


class Board:
    """Shows runs.

    Args:
        progress: Where to.
        trials: All runs.
    """

    def __init__(self, progress: Progress, trials: Sequence[Trial]) -> None:
        self.progress, self.trials = progress, trials
        self.live: Any = None
        self.said = time.monotonic()

    def __enter__(self) -> Board:
        if isinstance(self.progress, Terminal) and self.progress.console.is_terminal:
            from rich.live import Live

            self.live = Live(self._table(), console=self.progress.console, auto_refresh=False)
            self.live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def say(self, line: str) -> None:
        """One line."""
        self.progress.say(line)

    def tell(self, trial: Trial) -> None:
        """What became of a run."""
        if self.live is not None and trial.state != "diverged":
            return
        loss = "" if trial.held_out is None else f", held-out loss {trial.held_out:.3f}"
        self.say(f"  {trial.name} ({trial.told()}): {trial.state} after step {trial.step}{loss}")

    def show(self) -> None:
        """How far the runs are."""
        if self.live is not None:
            self.live.update(self._table(), refresh=True)
        elif time.monotonic() - self.said > LINE_SECONDS:
            self.said = time.monotonic()
            training = sum(trial.state == "training" for trial in self.trials)
            done, steps = (sum(getattr(t, name) for t in self.trials) for name in ("step", "steps"))
            self.say(
                f"  training {training} of {len(self.trials)} runs, {done} of at most {steps} steps taken"
            )

    def _table(self) -> Table:
        from rich.table import Table

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        names = list(self.trials[0].values)
        for column in ("run", *names, "seed", "step", "loss", "held-out", "state"):
            table.add_column(column, justify="left" if column in ("run", "state") else "right")
        ordered = sorted(self.trials, key=lambda t: (ORDER.index(t.state), t.held_out or 0.0))
        most = max(self.progress.console.height - 4, 4) if isinstance(self.progress, Terminal) else 0
        for trial in ordered[:most]:
            table.add_row(
                trial.name,
                *(short(trial.values[name]) for name in names),
                str(trial.options.seed),
                f"{trial.step}/{trial.steps}",
                f"{trial.losses[-1]:.3f}" if trial.losses else "",
                "" if trial.held_out is None else f"{trial.held_out:.3f}",
                trial.state,
            )
        if len(ordered) > most:
            table.add_row(f"and {len(ordered) - most} more")
        return table
