"""What a sweep leaves behind: sweep.json, a table, a picture, and a link to the best run."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..atomic import atomic_file
from ..errors import Hint, Text, TrainingError
from ..training.plots import can_plot, said_if_not_written
from ..training.progress import Progress
from ..training.resuming import write_json
from .options import RESULT_NAME, Grid, SweepOptions
from .picture import picture
from .trial import Trial, short

BEST = "best"


@dataclass
class Record:
    """What identifies a sweep.

    Attributes:
        options: What all runs share.
        grid: What they differ in.
        data: Hash of the rows to train on.
        eval_data: Hash of the rows to compare on.
        eval_tokens: Of those rows.
        base: Held-out loss of the base.
        seconds: Of training and of evaluation, of all workers together.
    """

    options: SweepOptions
    grid: Grid
    data: str
    eval_data: str
    eval_tokens: int
    base: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: {"training": 0.0, "evaluation": 0.0})

    def _identity(self) -> dict[str, Any]:
        fixed = {
            part.name: getattr(self.options, part.name)
            for part in dataclasses.fields(self.options)
            if not part.metadata["free"]
        }
        return {"options": fixed, "grid": self.grid, "data": self.data, "evaluation data": self.eval_data}

    def check_same(self, saved: Mapping[str, Any], output: Path) -> None:
        """Refuse to go on with another sweep.

        Raises:
            TrainingError: Listing what differs.
        """
        now = self._identity()
        options = {**saved["options"], "grid": saved["grid"]}
        given = {**now["options"], "grid": now["grid"]}
        wrong = [
            Text(Hint(name), f" was {was!r} and is {given.get(name)!r}")
            for name, was in options.items()
            if was != given.get(name)
        ]
        wrong += [Text(f"the {n} have other rows") for n in ("data", "evaluation data") if saved[n] != now[n]]
        if wrong:
            raise TrainingError(f"{output} contains another sweep: ", Text.join("; ", wrong))

    def write(self, output: Path, trials: Sequence[Trial], **unfinished: Any) -> dict[str, Any]:
        """Write ``sweep.json``.

        Args:
            output: Directory of the results.
            trials: All runs.
            **unfinished: Of a sweep that is to go on, what it needs for that.
        """
        groups = configurations(trials)
        best = None if unfinished else best_of(trials)
        trained = sum(trial.seen(trial.step) for trial in trials)
        tokens = {what: sum(trial.tokens[what] for trial in trials) for what in self.seconds}
        tokens["evaluation"] += self.eval_tokens  # by the base
        content = {
            "finished": not unfinished,
            **unfinished,
            "best": None if best is None else best.name,
            "base": self.base,
            "examples": {"trained": trained, "grid": sum(trial.seen(trial.steps) for trial in trials)},
            "tokens": tokens,
            "seconds": self.seconds,
            "configurations": groups,
            **self._identity(),
            "runs": [trial.record() for trial in trials],
        }
        write_json(output / RESULT_NAME, content)
        return content


def read_record(output: Path) -> dict[str, Any]:
    """Read ``sweep.json``.

    Raises:
        TrainingError: It is damaged.
    """
    place = output / RESULT_NAME
    try:
        content: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        content["finished"], content["runs"], content["options"], content["grid"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{place} is not the record of a sweep: {error}") from error
    return content


def configurations(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Each configuration with the held-out loss of its seeds, the best first.

    ``mean`` is None unless all of them came to the end.
    """
    groups: dict[int, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.configuration, []).append(trial)
    found: list[dict[str, Any]] = []
    for seeds in groups.values():
        losses = [trial.held_out for trial in seeds if trial.held_out is not None]
        states = [trial.state for trial in seeds]
        whole = set(states) == {"done"}
        found.append(
            {
                "values": seeds[0].values,
                "runs": [trial.name for trial in seeds],
                "state": "done" if whole else next(state for state in states if state != "done"),
                "step": max(trial.step for trial in seeds),
                "losses": losses,
                "mean": sum(losses) / len(losses) if whole else None,
            }
        )
    last = [sum(one["losses"]) / len(one["losses"]) if one["losses"] else float("inf") for one in found]
    order = sorted(range(len(found)), key=lambda i: (found[i]["mean"] is None, -found[i]["step"], last[i]))
    return [found[i] for i in order]


def best_of(trials: Sequence[Trial]) -> Trial:
    """The best run of the best configuration."""
    whole = [one for one in configurations(trials) if one["mean"] is not None]
    names = min(whole, key=lambda one: float(one["mean"]))["runs"]
    return min((trial for trial in trials if trial.name in names), key=lambda trial: trial.held_out or 0.0)


def write_results(output: Path, found: Mapping[str, Any], progress: Progress) -> None:
    """Write the table, the picture and the link to the best run; what was needed to go on is removed."""
    header, *body = rows(found)
    lines = [header, ["---"] * len(header), *body]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    with atomic_file(output / "sweep.md") as waiting:
        waiting.write_text(text, encoding="utf-8")
    if can_plot():
        with said_if_not_written(progress):
            picture(output / "sweep.png", found)
    _link(output, found["best"], progress)
    for place in output.glob("state-*"):
        shutil.rmtree(place, ignore_errors=True)


def rows(found: Mapping[str, Any]) -> list[list[str]]:
    """The table: a header, and a line for each configuration."""
    names = list(found["grid"])
    lines = [[*names, "held-out loss", "steps", "state", "runs"]]
    for one in found["configurations"]:
        losses = one["losses"]
        spread = f" ({min(losses):.3f}–{max(losses):.3f})" if len(losses) > 1 else ""
        loss = f"{sum(losses) / len(losses):.3f}{spread}" if losses else ""
        names_of_runs = f"{one['runs'][0]} to {one['runs'][-1]}" if len(one["runs"]) > 1 else one["runs"][0]
        values = [short(one["values"][name]) for name in names]
        lines.append([*values, loss, str(one["step"]), one["state"], names_of_runs])
    return lines


def _link(output: Path, name: str, progress: Progress) -> None:
    waiting = output / f".veneer-{secrets.token_hex(8)}.tmp"
    try:
        waiting.symlink_to(name, target_is_directory=True)
        os.replace(waiting, output / BEST)
    except OSError as error:
        progress.say(f"No link {BEST} -> {name} could be made here: {error.strerror or error}")
