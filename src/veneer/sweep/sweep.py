"""A sweep: the runs of a grid as one family, compared on held-out data, most of them stopped early."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import Hint, TrainingError, VeneerWarning
from ..family import Family, Result
from ..family.losses import ModelLoss
from ..files.layout import left_over
from ..training.data import Collator, LabelCollator
from ..training.data.batch import pad_token
from ..training.evaluate import objective_loss
from ..training.forward import batches
from ..training.libraries import require
from ..training.losses import Answers, Classes, Objective, class_loss
from ..training.models import load_tokenizer
from ..training.planning.memory import enable_checkpointing
from ..training.progress import Progress, Silent
from ..training.resuming import METRICS_NAME, digest, write_json
from ..training.run import absolute, encoded, load_training_base, read_all
from ..training.stopping import Interrupted, Stop, stop_on_signals
from ..training.train_rows import class_names
from .board import Board
from .halving import Halving
from .options import Grid, SweepOptions, check_sweep
from .packs import Packs, packs
from .results import Record, configurations, read_record, write_results
from .trial import Trial, trials

#: Seconds between two saves of everything.
SAVE_SECONDS = 300.0
#: Held-out examples that runs are compared on at least, if there are so many.
FEWEST = 16

Batches = Mapping[str, Mapping[str, Tensor]]


def sweep(options: SweepOptions, grid: Grid, progress: Progress | None = None) -> dict[str, Any]:
    """Train the runs of a grid in one pass, compare them on held-out data, and write what came of it.

    Args:
        options: What all runs share.
        grid: What they differ in.
        progress: Where to report.

    Returns:
        What ``sweep.json`` holds: ``best``, the name of the best run; ``configurations`` with the mean
        held-out loss of their seeds; ``runs`` with all losses; how much was trained.

    Raises:
        VeneerError: Something is wrong with the options, the data or the model, or no run came to its end.
        Interrupted: SIGINT or SIGTERM came; with ``resume`` the sweep goes on, bit for bit.
    """
    require("transformers", "train", "a sweep")
    require("accelerate", "train", "a sweep")
    progress = Silent() if progress is None else progress
    check_sweep(options)
    options = replace(options, model=absolute(options.model))
    output = Path(options.output)
    saved = read_record(output) if options.resume else None
    records = read_all(options, progress)
    tokenizer = load_tokenizer(options.model)
    rows, eval_rows, classes = encoded(options, records, tokenizer, None, progress)
    every = trials(options, grid, len(rows))
    record = Record(options, grid, digest(rows), digest(eval_rows))
    if saved is not None:
        record.check_same(saved, output)
        if saved["finished"]:
            progress.say(f"The sweep in {output} is finished: nothing is left to train.")
            write_results(output, saved, progress)
            return saved
        for trial, one in zip(every, saved["runs"], strict=True):
            trial.restore(one)
    torch.manual_seed(options.seed)  # a classifier's head, which all runs start from, is drawn with the base
    base = load_training_base(options, classes, progress)
    length = max(len(row["input_ids"]) for row in (*rows, *eval_rows))
    fitting = packs(base, every, length, options)
    pad = pad_token(tokenizer)
    objective: Objective = Classes(LabelCollator(pad)) if classes else Answers(Collator(pad))
    if saved is None:
        record.base = objective_loss(base, eval_rows, objective, options.batch_size, progress)
        progress.say(_what_comes(every, fitting, options, record.base))
    else:
        record.go_on(saved)
        fitting.room = saved["room"]
    if options.gradient_checkpointing:
        for note in enable_checkpointing(base):
            progress.say(note)
    work = Sweep(Family(base), every, rows, eval_rows, objective, tokenizer, fitting, record, output)
    with Board(progress, every) as board, stop_on_signals(progress.say) as stop:
        work.go(board, stop, None if saved is None or saved["state"] is None else output / saved["state"])
    return work.finish(progress)


def _what_comes(every: Sequence[Trial], fitting: Packs, options: SweepOptions, base: float) -> str:
    count = len({trial.configuration for trial in every})
    together = len(fitting.first([trial.name for trial in every]))
    seeds = f" with {options.seeds} seeds" * (options.seeds > 1)
    rungs = f", compared after {' and '.join(map(str, every[0].rungs))}" * (len(every[0].rungs) > 1)
    return (
        f"{count} configurations{seeds}: {len(every)} runs of {every[0].steps} steps{rungs}; {together} fit "
        f"into one pass. Held-out loss of the base: {base:.3f}"
    )


class Sweep:
    """The loop.

    Args:
        family: Of the base.
        trials: All runs.
        rows: To train on.
        eval_rows: To compare on.
        objective: What is learned from a row.
        tokenizer: Saved beside each adapter.
        packs: What fits into memory.
        record: What identifies the sweep.
        output: Directory of the results.
    """

    def __init__(
        self,
        family: Family,
        trials: Sequence[Trial],
        rows: Sequence[Any],
        eval_rows: Sequence[Any],
        objective: Objective,
        tokenizer: Any,
        packs: Packs,
        record: Record,
        output: Path,
    ) -> None:
        self.family, self.trials, self.rows, self.eval_rows = family, trials, rows, eval_rows
        self.collate, self.tokenizer, self.packs = objective.collator, tokenizer, packs
        self.loss: str | ModelLoss = class_loss if isinstance(objective, Classes) else "cross_entropy"
        self.record, self.output = record, output
        self.halving = Halving(trials)
        self.states = 0

    def go(self, board: Board, stop: Stop, state: Path | None = None) -> None:
        """Train until nothing is left to train.

        Args:
            board: Shows the runs.
            stop: Ends the loop after a step.
            state: What to go on from.

        Raises:
            Interrupted: By ``stop``; everything is saved.
        """
        self.board = board
        if self.output.is_dir():
            for path in left_over(self.output):
                path.unlink(missing_ok=True)
        if state is not None:
            for trial in self._in("training", "paused"):
                self._add(trial)
            self.family.load_state(state)
            self.states = int(state.name.partition("-")[2])
        else:
            self.record.write(self.output, self.trials, room=self.packs.room, state=None)
        saved = time.monotonic()
        self._begin()
        while training := self._in("training"):
            self._step(training)
            arrived = [trial for trial in self._in("training") if trial.step == trial.rungs[trial.rung]]
            if arrived:
                self._compare(arrived)
                self._begin()
            board.show()
            if stop.asked or time.monotonic() - saved > SAVE_SECONDS:
                self._save()
                saved = time.monotonic()
            if stop.asked:
                done = sum(trial.step for trial in self.trials)
                raise Interrupted(done, sum(trial.steps for trial in self.trials), self.output)
        for trial in self._in("paused"):
            self._leave(trial, "stopped")

    def _in(self, *states: str) -> list[Trial]:
        return [trial for trial in self.trials if trial.state in states]

    def _begin(self) -> None:
        """Begin with what is to be trained next, as far as it fits."""
        while seeds := self.halving.next():
            names = [trial.name for trial in (*self._in("training"), *seeds)]
            if len(names) > len(seeds) and not self.packs.fit(names):
                return
            for trial in seeds:
                if trial.state == "waiting":
                    self._add(trial)
                trial.state, trial.rung = "training", trial.rung + 1

    def _add(self, trial: Trial) -> None:
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

    def _step(self, training: Sequence[Trial]) -> None:
        """One optimizer step of each run."""
        parts = {trial.name: trial.batches(self.rows) for trial in training}
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
                warnings.simplefilter("ignore", VeneerWarning)  # what is not taken is said below
                taken = self.family.optim_step([trial.name for trial in sound])
        for trial in training:
            if trial.name not in taken or not taken[trial.name].taken:
                self._leave(trial, "diverged")
                continue
            trial.step += 1
            trial.losses.append(losses[trial.name])

    def _compare(self, arrived: Sequence[Trial]) -> None:
        """Evaluate runs together, and decide which ones go on."""
        for rung in sorted({trial.rung for trial in arrived}):
            self._evaluate([trial for trial in arrived if trial.rung == rung], self._held_out(rung))
        for trial in self.halving.out():
            self._leave(trial, "stopped")

    def _held_out(self, rung: int) -> list[Any]:
        """What to compare runs on: before their end as many examples as they were trained on, or a few."""
        every, count = self.eval_rows, max(trial.seen(trial.rungs[rung]) for trial in self.trials)
        count = len(every) if rung == len(self.trials[0].rungs) - 1 else min(max(count, FEWEST), len(every))
        return [every[number * len(every) // count] for number in range(count)]

    def _evaluate(self, arrived: Sequence[Trial], rows: Sequence[Any]) -> None:
        sums = {trial.name: (0.0, 0.0) for trial in arrived}
        for batch in batches(self.family.model, rows, self.collate, arrived[0].options.batch_size):
            for name, one in self._together(dict.fromkeys(sums, batch), self.family.forward).items():
                sums[name] = sums[name][0] + one.loss * one.count, sums[name][1] + one.count
        for trial in arrived:
            total, count = sums[trial.name]
            if not math.isfinite(total):
                self._leave(trial, "diverged")
                continue
            trial.evaluations.append(total / count)
            trial.state = "paused"
            if trial.step == trial.steps:
                self._keep(trial)
                self._leave(trial, "done")

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
                self.board.say(f"Out of memory with {len(pack)} runs at once: half as many from here on.")
                continue
            waiting = waiting[len(pack) :]
        return found

    def _keep(self, trial: Trial) -> None:
        """Save a run that came to its end, as `veneer train` saves it."""
        place = self.output / trial.name
        self.output.mkdir(parents=True, exist_ok=True)
        self.family.save_pretrained(self.output, [trial.name])
        self.tokenizer.save_pretrained(place)
        metrics = {
            "steps": trial.step,
            "options": dataclasses.asdict(trial.options),
            "losses": [{"step": step, "loss": loss} for step, loss in enumerate(trial.losses, 1)],
            "evaluations": trial.record()["evaluations"],
        }
        if names := class_names(self.family.model):
            metrics["label_names"] = names
        write_json(place / METRICS_NAME, metrics)

    def _leave(self, trial: Trial, state: Any) -> None:
        trial.state = state
        self.family.remove(trial.name)
        self.board.tell(trial)

    def _save(self) -> None:
        """Save everything, to go on bit for bit; what was saved before is whole until this is."""
        before = self.output / f"state-{self.states}"
        self.states += 1
        place = self.output / f"state-{self.states}"
        self.family.save_state(place)
        self.record.write(self.output, self.trials, room=self.packs.room, state=place.name)
        shutil.rmtree(before, ignore_errors=True)

    def finish(self, progress: Progress) -> dict[str, Any]:
        """Write the results.

        Raises:
            TrainingError: There are none.
        """
        if not any(one["mean"] is not None for one in configurations(self.trials)):
            raise TrainingError(
                "no run came to its end: all of them diverged. Try lower values of ", Hint("learning_rate")
            )
        found = self.record.write(self.output, self.trials)
        write_results(self.output, found, progress)
        return found


def _schedule(trial: Trial, optimizer: Any) -> Any:
    from transformers import get_scheduler

    options = trial.options
    warmup = options.warmup_steps or math.ceil(options.warmup_ratio * trial.steps)
    return get_scheduler(options.lr_scheduler_type, optimizer, warmup, trial.steps)
