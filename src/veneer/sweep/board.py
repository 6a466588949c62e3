"""The runs of a sweep while they are trained: a table that lives on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..training.progress import Progress, Terminal
from .trial import Trial, short, steps_of

if TYPE_CHECKING:
    from rich.console import Group

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
            self.live.transient = kind is None  # the results follow
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
            self.say(f"  training {training} of {len(self.trials)} runs, {steps_of(self.trials)} taken")

    def _table(self) -> Group:
        """The runs, as many as the terminal has room for."""
        console = self.progress.console  # type: ignore[attr-defined]
        shown = self._rows(most := max(console.height - 3, 4))
        above = len(console.render_lines(shown)) - console.height + 1
        return shown if above <= 0 else self._rows(max(most - above, 4))

    def _rows(self, most: int) -> Group:
        """Some of the runs; where columns are narrow, what runs differ in gives way to how far they are."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        names = list(self.trials[0].values)
        seeds = ["seed"] * (len({trial.options.seed for trial in self.trials}) > 1)
        for column in ("run", *names, *seeds, "step", "loss", "held-out", "state"):
            header = Text(column, overflow="fold", no_wrap=False, justify="left" if column in names else None)
            left = column in ("run", "state")
            table.add_column(header, justify="left" if left else "right", no_wrap=column not in names)
        ordered = sorted(self.trials, key=lambda t: (ORDER.index(t.state), t.held_out or 0.0))
        for trial in ordered[:most]:
            table.add_row(
                trial.name,
                *(Text(short(trial.values[name]), overflow="ellipsis", no_wrap=True) for name in names),
                *(str(getattr(trial.options, name)) for name in seeds),
                f"{trial.step}/{trial.steps}",
                f"{trial.losses[-1]:.3f}" if trial.losses else "",
                "" if trial.held_out is None else f"{trial.held_out:.3f}",
                trial.state,
            )
        rest = f"and {len(ordered) - most} more; " * (len(ordered) > most)
        return Group(table, Text(f"{rest}{steps_of(self.trials)} taken", style="dim"))
