"""A worker of a sweep: it holds the base, and trains the runs that it is given until they are compared."""

from __future__ import annotations

import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import VeneerWarning
from ..family import Family, Result
from ..family.losses import ModelLoss
from ..forward import IGNORED
from ..training.data import Collator, LabelCollator
from ..training.evaluate import objective_loss
from ..training.forward import batches
from ..training.losses import Answers, Classes, Objective, class_loss
from ..training.planning.memory import enable_checkpointing
from ..training.progress import Progress, Silent
from ..training.run import load_training_base
from .options import SweepOptions
from .packs import Packs, packs
from .trial import Trial, tokens_of

#: What runs are compared on at least, if there is so much: tokens of answers, or labels of a classifier.
FEWEST = 256

Batches = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Work:
    """What all workers of a sweep are given.

    Attributes:
        options: What all runs share.
        trials: All runs, as they were when the sweep began.
        rows: To train on.
        eval_rows: To compare on.
        pad: Padding token.
        classes: Of a classifier, by number.
    """

    options: SweepOptions
    trials: Sequence[Trial]
    rows: Sequence[Any]
    eval_rows: Sequence[Any]
    pad: int
    classes: list[str] | None = None


@dataclass
class Report:
    """What became of the runs of a worker since it was asked last.

    Attributes:
        runs: `Trial.record` of each.
        states: What those go on from that were compared, and are no longer with the worker.
        adapters: The files of those that came to their end.
        lines: To be told.
        room: Bytes for all runs.
        seconds: Of training and of evaluation.
    """

    runs: list[dict[str, Any]]
    room: int
    states: dict[str, Any] = field(default_factory=dict)
    adapters: dict[str, dict[str, bytes]] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


class Worker:
    """The base and the runs that are trained on it now.

    Args:
        work: What there is to do.
        progress: Where to report how the base is loaded.
    """

    def __init__(self, work: Work, progress: Progress | None = None) -> None:
        self.work = work
        pad, classes = work.pad, work.classes
        self.objective: Objective = Classes(LabelCollator(pad)) if classes else Answers(Collator(pad))
        self.loss: str | ModelLoss = class_loss if classes else "cross_entropy"
        self.collate = self.objective.collator
        self.progress = Silent() if progress is None else progress
        self.trials: dict[str, Trial] = {}

    def load(self) -> None:
        """Load the base.

        Raises:
            TrainingError: It cannot be loaded.
        """
        # A classifier's head, which all runs start from, is drawn with it.
        torch.manual_seed(self.work.options.seed)
        self.base = load_training_base(self.work.options, self.work.classes, self.progress)

    def base_loss(self) -> float:
        """Held-out loss of the base."""
        size = self.work.options.batch_size
        return objective_loss(self.base, self.work.eval_rows, self.objective, size, self.progress)

    def prepare(self, share: int = 1) -> Packs:
        """Become ready for runs, once every worker of this machine has loaded its base.

        Args:
            share: Workers that share the memory of this one.

        Returns:
            What runs take, and what there is.

        Raises:
            VeneerError: An adapter does not fit the base, or a run does not fit into memory.
        """
        work = self.work
        length = max(len(row["input_ids"]) for row in (*work.rows, *work.eval_rows))
        self.packs = packs(self.base, work.trials, length, work.options, share)
        if work.options.gradient_checkpointing:
            for note in enable_checkpointing(self.base):
                self.progress.say(note)
        self.family = Family(self.base, exact=work.options.exact)
        return self.packs

    def set_room(self, room: int) -> None:
        """Take at most so many bytes for runs."""
        self.packs.room = room

    def begin(self, trials: Sequence[Trial], states: Mapping[str, Any]) -> None:
        """Take runs, which go on from their states, or begin.

        Raises:
            VeneerError: An adapter does not fit the base.
        """
        for trial in trials:
            options = trial.options
            self.family.add(
                trial.name,
                options.lora_config(),
                learning_rate=options.learning_rate,
                weight_decay=options.weight_decay,
                schedule=partial(_schedule, trial),
                max_grad_norm=options.max_grad_norm or None,
                seed=options.seed,
            )
            self.trials[trial.name] = trial
        if states:
            self.family.load_state_dict(states)

    def train(self, seconds: float) -> Report:
        """Train for so long, at least a step, and until some runs are to be compared."""
        end = time.monotonic() + seconds
        runs = list(self.trials.values())
        self.report = Report([], self.packs.room)
        while True:
            with self._timed("training"):
                self._step(list(self.trials.values()))
            arrived = [one for one in self.trials.values() if one.step == one.rungs[one.rung]]
            with self._timed("evaluation"):
                for rung in sorted({trial.rung for trial in arrived}):
                    self._evaluate([trial for trial in arrived if trial.rung == rung], self._held_out(rung))
            if len(self.trials) < len(runs) or time.monotonic() >= end:
                break
        self.report.runs, self.report.room = [trial.record() for trial in runs], self.packs.room
        return self.report

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self.report.seconds[what] = self.report.seconds.get(what, 0.0) + time.monotonic() - begun

    def states(self) -> dict[str, Any]:
        """What the runs go on from."""
        return self.family.state_dict()

    def _step(self, training: Sequence[Trial]) -> None:
        """One optimizer step of each run."""
        parts = {trial.name: trial.batches(self.work.rows) for trial in training}
        for trial in training:
            trial.tokens["training"] += sum(map(tokens_of, parts[trial.name]))
        sums = {trial.name: (0.0, 0.0) for trial in training}
        for number in range(max(map(len, parts.values()))):
            given = {name: self.collate(p[number]) for name, p in parts.items() if number < len(p)}
            for name, one in self._together(given, self.family.forward_backward).items():
                sums[name] = sums[name][0] + one.loss * one.count, sums[name][1] + one.count
        losses = {name: total / count for name, (total, count) in sums.items()}
        sound = [trial for trial in training if math.isfinite(losses[trial.name])]
        taken = {}
        if sound:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", VeneerWarning)  # the board tells what is not taken
                taken = self.family.optim_step([trial.name for trial in sound])
        for trial in training:
            if trial.name not in taken or not taken[trial.name].taken:
                self._leave(trial, "diverged")
                continue
            trial.step += 1
            trial.losses.append(losses[trial.name])

    @cached_property
    def _counted(self) -> int:
        """Tokens of answers, or labels, of all held-out examples."""
        return sum(int((self.collate([row])["labels"] != IGNORED).sum()) for row in self.work.eval_rows)

    def _held_out(self, rung: int) -> Sequence[Any]:
        """What to compare runs on: before their end as many examples as they were trained on, or `FEWEST`."""
        trials, every = self.work.trials, self.work.eval_rows
        if rung == len(trials[0].rungs) - 1:
            return every
        seen = max(trial.seen(trial.rungs[rung]) for trial in trials)
        count = min(max(seen, math.ceil(FEWEST * len(every) / self._counted)), len(every))
        return [every[number * len(every) // count] for number in range(count)]

    def _evaluate(self, arrived: Sequence[Trial], rows: Sequence[Any]) -> None:
        sums = {trial.name: (0.0, 0.0) for trial in arrived}
        for trial in arrived:
            trial.tokens["evaluation"] += tokens_of(rows)
        for batch in batches(self.family.model, rows, self.collate, arrived[0].options.batch_size):
            for name, one in self._together(dict.fromkeys(sums, batch), self.family.forward).items():
                sums[name] = sums[name][0] + one.loss * one.count, sums[name][1] + one.count
        for trial in arrived:
            total, count = sums[trial.name]
            if not math.isfinite(total):
                self._leave(trial, "diverged")
                continue
            trial.evaluations.append(total / count)
            if trial.step == trial.steps:
                self.report.adapters[trial.name] = self._files(trial.name)
                self._leave(trial, "done")
            else:
                self.report.states |= self.family.state_dict([trial.name])
                self._leave(trial, "paused")

    def _together(
        self, given: Batches, call: Callable[[Batches, str | ModelLoss], dict[str, Result]]
    ) -> dict[str, Result]:
        """Compute batches of several runs, in as few passes as fit into memory."""
        found: dict[str, Result] = {}
        waiting = list(given)
        while waiting:
            pack = self.packs.first(waiting)
            try:
                found |= call({name: given[name] for name in pack}, self.loss)
            except (RuntimeError, MemoryError) as error:
                self.packs.halve(pack, error)
                self.report.lines.append(
                    f"Out of memory with {len(pack)} runs at once: half as many from here on."
                )
                continue
            waiting = waiting[len(pack) :]
        return found

    def _files(self, name: str) -> dict[str, bytes]:
        with tempfile.TemporaryDirectory() as place:
            self.family.save_pretrained(place, [name])
            return {file.name: file.read_bytes() for file in (Path(place) / name).iterdir()}

    def _leave(self, trial: Trial, state: Any) -> None:
        trial.state = state
        self.family.remove(trial.name)
        del self.trials[trial.name]


def _schedule(trial: Trial, optimizer: Any) -> Any:
    from transformers import get_scheduler

    options = trial.options
    warmup = options.warmup_steps or math.ceil(options.warmup_ratio * trial.steps)
    return get_scheduler(options.lr_scheduler_type, optimizer, warmup, trial.steps)
