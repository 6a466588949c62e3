"""A sweep: the runs of a grid, compared on held-out data, most of them stopped early."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..atomic import disk_is_full
from ..errors import Hint, Text, TrainingError
from ..family.family import read_states, write_states
from ..files.layout import left_over
from ..training.data.batch import pad_token
from ..training.libraries import require
from ..training.models import load_tokenizer
from ..training.progress import Progress, Silent
from ..training.resuming import METRICS_NAME, digest, json_bytes, reason, tokenizer_files, write_files
from ..training.run import absolute, encoded, read_all
from ..training.stopping import Interrupted, Stop, stop_on_signals
from .board import Board
from .halving import Halving
from .handle import Handle, Here, Lost
from .options import RESULT_NAME, Grid, SweepOptions, check_sweep
from .results import Record, configurations, read_record, write_results
from .trial import Trial, steps_of, tokens_of, trials
from .worker import Report, Work, Worker

#: Seconds between two saves of everything.
SAVE_SECONDS = 300.0


def sweep(options: SweepOptions, grid: Grid, progress: Progress | None = None) -> dict[str, Any]:
    """Train the runs of a grid, compare them on held-out data, and write what came of it.

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
    record = Record(options, grid, digest(rows), digest(eval_rows), tokens_of(eval_rows))
    if saved is not None:
        record.check_same(saved, output)
        for unfinished in output.glob(".veneer-*.tmp"):  # a kill left it
            unfinished.unlink()
        if saved["finished"]:
            progress.say(f"The sweep in {output} is finished: nothing is left to train.")
            write_results(output, saved, progress)
            return saved
        record.base, record.seconds = saved["base"], saved["seconds"]
        for trial, one in zip(every, saved["runs"], strict=True):
            trial.restore(one)
        progress.say(f"Going on after {steps_of(every)}")
    work = Work(options, every, rows, eval_rows, pad_token(tokenizer), classes)
    with _workers(work, progress) as workers:
        if saved is None:
            begun = time.monotonic()
            record.base = workers[0].call("base_loss")
            record.seconds["evaluation"] += time.monotonic() - begun
            progress.say(_what_comes(every, workers, options, record.base))
        with Board(progress, every) as board, stop_on_signals(progress.say) as stop:
            loop = Sweep(every, workers, tokenizer, classes, record, output)
            with _writing(output):
                loop.go(board, stop, saved)
    with _writing(output):
        return loop.finish(progress)


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    """Say of what cannot be written what is left of the sweep."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not disk_is_full(error):
            raise
        way = ". Once this is mended, ", Hint("resume", True), " goes on from what was saved last"
        left = Text(*way) if (output / RESULT_NAME).is_file() else Text(". Nothing was trained yet")
        raise TrainingError(f"the sweep cannot be written to {output}: {reason(error)}", left) from error


@contextmanager
def _workers(work: Work, progress: Progress) -> Iterator[list[Handle]]:
    if work.options.ray is not None:
        from .on_ray import ray_workers

        with ray_workers(work, progress) as there:
            yield there
        return
    here = Here(Worker(work, progress))
    here.call("load")
    here.packs = here.call("prepare")
    yield [here]


def _what_comes(every: Sequence[Trial], workers: Sequence[Handle], options: SweepOptions, base: float) -> str:
    count = len({trial.configuration for trial in every})
    together = min(len(worker.packs.first([trial.name for trial in every])) for worker in workers)
    seeds = f" with {options.seeds} seeds" * (options.seeds > 1)
    *first, last = every[0].rungs
    rungs = f", compared after {', '.join(map(str, first))} and {last}" * bool(first)
    return (
        f"{count} configurations{seeds}: {len(every)} runs of {every[0].steps} steps{rungs}; {together} fit "
        f"into one pass. Held-out loss of the base: {base:.3f}"
    )


class Sweep:
    """The loop.

    Args:
        trials: All runs.
        workers: Where they are trained.
        tokenizer: Saved beside each adapter.
        classes: Of a classifier, by number.
        record: What identifies the sweep.
        output: Directory of the results.
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        workers: list[Handle],
        tokenizer: Any,
        classes: list[str] | None,
        record: Record,
        output: Path,
    ) -> None:
        self.trials = {trial.name: trial for trial in trials}
        self.workers, self.tokenizer, self.classes = workers, tokenizer, classes
        self.record, self.output = record, output
        self.halving = Halving(trials)
        #: What runs go on from that are paused, or would if their worker were lost.
        self.held: dict[str, Any] = {}
        self.began: dict[str, dict[str, Any]] = {}
        self.news = True
        self.saves = 0

    def go(self, board: Board, stop: Stop, saved: dict[str, Any] | None = None) -> None:
        """Train until nothing is left to train.

        Args:
            board: Shows the runs.
            stop: Ends the loop after a step.
            saved: The record of what to go on from.

        Raises:
            Interrupted: By ``stop``; everything is saved.
            TrainingError: No worker is left; everything is saved that the sweep had of the runs.
        """
        self.board = board
        if self.output.is_dir():
            for path in left_over(self.output):
                path.unlink(missing_ok=True)
        if saved is None:
            self.record.write(self.output, list(self.trials.values()), room=self._room(), state=None)
        else:
            self._go_on(saved)
        last = time.monotonic()
        self._begin()
        board.show()  # the first step may take minutes
        while self._train():
            if stop.asked or time.monotonic() - last > SAVE_SECONDS:
                self._save()
                last = time.monotonic()
            if stop.asked:
                every = self.trials.values()
                raise Interrupted(sum(t.step for t in every), sum(t.steps for t in every), self.output)
            self._begin()
        for trial in self._in("paused"):
            self._leave(trial, "stopped")

    def _go_on(self, saved: dict[str, Any]) -> None:
        for worker in self.workers:
            worker.packs.room = saved["room"]
            worker.call("set_room", saved["room"])
        if saved["state"] is not None:
            self.held = read_states(self.output / saved["state"])
            self.saves = int(saved["state"].partition("-")[2])

    def _room(self) -> int:
        return min(worker.packs.room for worker in self.workers)

    def _in(self, *states: str) -> list[Trial]:
        return [trial for trial in self.trials.values() if trial.state in states]

    def _begin(self) -> None:
        """Once runs were compared, stop some, and give workers what comes next, as far as it fits."""
        if not self.news:
            return
        self.news = False
        for trial in self.halving.out():
            self._leave(trial, "stopped")
        new: dict[str, list[Trial]] = {}
        while seeds := self._homeless() or self.halving.next():
            worker = self._free(seeds)
            if worker is None:
                break
            for trial in seeds:
                if trial.state != "training":
                    trial.state, trial.rung = "training", trial.rung + 1
                self.began[trial.name] = trial.record()
            worker.trials += seeds
            new.setdefault(worker.name, []).extend(seeds)
        for worker in [worker for worker in self.workers if worker.name in new]:
            begun = new[worker.name]
            states = {trial.name: self.held[trial.name] for trial in begun if trial.name in self.held}
            try:
                worker.call("begin", begun, states)
            except Lost as lost:
                self._lose(worker, lost)

    def _homeless(self) -> list[Trial]:
        """Runs of a configuration that are to be trained and have no worker."""
        placed = {trial.name for worker in self.workers for trial in worker.trials}
        left = [trial for trial in self._in("training") if trial.name not in placed]
        return [trial for trial in left if trial.configuration == left[0].configuration]

    def _free(self, seeds: Sequence[Trial]) -> Handle | None:
        """The worker with the fewest runs that does not train yet and has room for more."""
        names = [trial.name for trial in seeds]
        for worker in sorted(self.workers, key=lambda worker: len(worker.trials)):
            has = [trial.name for trial in worker.trials]
            if not worker.busy and (not has or worker.packs.fit([*has, *names])):
                return worker
        return None

    def _train(self) -> bool:
        """Let all workers train until one of them reports, and say whether one has."""
        for worker in self.workers:
            if worker.trials and not worker.busy:
                worker.ask("train", worker.seconds)
                worker.busy = True
        busy = [worker for worker in self.workers if worker.busy]
        if busy:
            self._hear(busy[0].first(busy))
            self.board.show()
        return bool(busy)

    def _hear(self, worker: Handle) -> None:
        """Take over what a worker reports."""
        worker.busy = False
        try:
            report: Report = worker.answer()
        except Lost as lost:
            self._lose(worker, lost)
            return
        for line in report.lines:
            self.board.say(line)
        worker.packs.room = report.room
        for what, seconds in report.seconds.items():
            self.record.seconds[what] += seconds
        self.held |= report.states
        for record in report.runs:
            trial = self.trials[record["name"]]
            trial.restore(record)
            if trial.state in ("diverged", "done"):
                if trial.state == "done":
                    self._keep(trial, report.adapters[trial.name])
                self._leave(trial, trial.state)
        left = [trial for trial in worker.trials if trial.state == "training"]
        self.news |= len(left) < len(worker.trials)
        worker.trials = left

    def _lose(self, worker: Handle, lost: Lost) -> None:
        """Go on without a worker: its runs begin again where they were when it got them.

        Raises:
            TrainingError: It was the last one.
        """
        self.workers.remove(worker)
        self.news = True
        for trial in worker.trials:
            trial.restore(self.began[trial.name])
        names = ", ".join(trial.name for trial in worker.trials) or "no runs"
        self.board.say(f"{worker.name} is gone ({lost}). It had {names}: others take over.")
        if not self.workers:
            self._write_state({}, worker.packs.room)
            raise TrainingError(
                f"no worker is left; the last one: {lost}. The sweep goes on with ", Hint("resume", True)
            )

    def _keep(self, trial: Trial, files: dict[str, bytes]) -> None:
        """Save a run that came to its end, as `veneer train` saves it."""
        metrics = {
            "steps": trial.step,
            "options": dataclasses.asdict(trial.options),
            "losses": [{"step": step, "loss": loss} for step, loss in enumerate(trial.losses, 1)],
            "evaluations": trial.record()["evaluations"],
        }
        if self.classes:
            metrics["label_names"] = self.classes
        place = self.output / trial.name
        write_files(place, {**files, **tokenizer_files(self.tokenizer), METRICS_NAME: json_bytes(metrics)})

    def _leave(self, trial: Trial, state: Any) -> None:
        trial.state = state
        self.held.pop(trial.name, None)
        self.board.tell(trial)

    def _save(self) -> None:
        """Save everything, to go on bit for bit."""
        while busy := [worker for worker in self.workers if worker.busy]:
            self._hear(busy[0].first(busy))
        states: dict[str, Any] = {}
        for worker in list(self.workers):
            try:
                states |= worker.call("states")
            except Lost as lost:
                self._lose(worker, lost)
        self._write_state(states, self._room())

    def _write_state(self, states: dict[str, Any], room: int) -> None:
        """Save the states of runs, those that are held too; what was saved before is whole until this is."""
        before = self.output / f"state-{self.saves}"
        self.saves += 1
        place = self.output / f"state-{self.saves}"
        write_states(place, self.held | states)
        self.record.write(self.output, list(self.trials.values()), room=room, state=place.name)
        shutil.rmtree(before, ignore_errors=True)

    def finish(self, progress: Progress) -> dict[str, Any]:
        """Write the results.

        Raises:
            TrainingError: There are none.
        """
        every = list(self.trials.values())
        if not any(one["mean"] is not None for one in configurations(every)):
            raise TrainingError(
                "no run came to its end: all of them diverged. Try lower values of ", Hint("learning_rate")
            )
        found = self.record.write(self.output, every)
        write_results(self.output, found, progress)
        return found
