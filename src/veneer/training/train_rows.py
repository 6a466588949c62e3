"""`train` an adapted model on rows of tokens, and save what it learned."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from ..atomic import HalfMovedError, new_directory
from ..errors import CheckpointError, Hint, Text, TrainingError
from ..integrations.transformers import enable_trainer
from .data import Collator, pad_token
from .launcher import is_first, processes
from .libraries import quiet_libraries, require
from .losses import Answers, Objective, Preferred, check_chunks
from .options import TrainOptions, check_names
from .progress import Progress, Silent
from .resuming import (
    METRICS_NAME,
    RUN_NAME,
    Run,
    begin_afresh,
    check_same_run,
    checkpoints,
    finished_run,
    json_bytes,
    last_checkpoint,
    reason,
    remove_checkpoint,
    run_record,
    tokenizer_files,
    write_files,
    write_json,
)
from .stopping import Interrupted, Stop


def train(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Any],
    output: str | os.PathLike[str],
    options: TrainOptions | None = None,
    progress: Progress | None = None,
    *,
    eval_rows: Sequence[Any] = (),
    objective: Objective | Preferred | None = None,
    callbacks: Sequence[Any] = (),
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Train an adapted model on token rows, and save the adapter and the tokenizer.

    With ``options.resume``, an interrupted run continues from its last checkpoint and reaches the losses that
    it would have reached without the interruption. A run at its last step is not trained further; only
    missing files are written. If the options now ask for more steps, it continues to the new last one.

    Args:
        model: From `get_peft_model` (or any model of transformers with trainable parameters).
        tokenizer: Saved beside the adapter; its padding token fills up batches.
        rows: From `encode`, or whatever the objective's collator takes.
        output: Directory for the adapter, checkpoints, ``metrics.json`` and the tokenizer.
        options: How to train.
        progress: Reports loss and time left.
        eval_rows: Held-out rows, evaluated before the first step, after the last, and every ``eval_steps``.
        objective: What is learned from a row; by default the tokens of its answers.
        callbacks: Further callbacks for transformers' Trainer.
        stop: Checked after each step; ends the run with a checkpoint.

    Returns:
        What ``metrics.json`` holds: ``losses`` (step, loss, learning rate), ``evaluations`` (step, loss, …),
        ``steps``, ``seconds``, ``tokens`` seen without padding, ``trainable`` parameters, ``options``. In a
        distributed run, the first process writes them.

    Raises:
        ConfigError: An option that transformers does not know.
        TrainingError: Nothing is trainable, the loss became NaN or infinite, a checkpoint cannot be written,
            or the output holds no checkpoint of this run to resume from.
        Interrupted: ``stop`` ended the run; a checkpoint is in the output.
    """
    require("transformers", "train", "training")
    require("accelerate", "train", "training")
    options = TrainOptions() if options is None else options
    progress = Silent() if progress is None else progress
    check_names(options)
    _check_trainable(model, rows, options)
    from .trainer import total_steps

    steps = total_steps(len(rows), options, processes())
    record = run_record(model, rows, eval_rows, options, processes(), steps)
    if options.resume and (metrics := finished_run(Path(output), record)) is not None:
        progress.say(f"The run in {output} is finished: nothing is left to train.")
        return metrics
    run = _begin(Path(output), options, record, bool(eval_rows), stop or Stop())
    if run.finished:
        progress.say(f"The run has reached its last step, {steps}: nothing is left to train, only to write.")
    elif run.planned < steps:
        progress.say(
            f"The run was planned with {run.planned} steps and now has {steps}: from here the learning rate "
            f"follows the {options.lr_scheduler_type} schedule of {steps} steps."
        )
    make = partial(_trainer, model, tokenizer, rows, eval_rows, run, objective)
    with ExitStack() as stack:
        if is_first():
            try:
                stack.enter_context(new_directory(run.output))
            except OSError as error:
                raise TrainingError(f"the directory {run.output} cannot be made: {reason(error)}") from error
        state, seconds, stopped = _steps(run, make, callbacks, progress)
        if stopped:
            place = run.output / f"checkpoint-{state.global_step}"
            raise Interrupted(state.global_step, state.max_steps, place)
        metrics = _metrics(run, model, state, seconds)
        _write(run, model, tokenizer, metrics)
    return metrics


def _check_trainable(model: Any, rows: Sequence[Any], options: TrainOptions) -> None:
    if not rows:
        raise TrainingError("there are no rows to train on")
    if not any(p.requires_grad for p in model.parameters()):
        raise TrainingError(
            "no parameter of the model is trainable: to train a saved adapter, load it with is_trainable=True"
        )
    if options.loss_chunk_size:
        check_chunks(model)


def _begin(output: Path, options: TrainOptions, record: dict[str, Any], evaluated: bool, stop: Stop) -> Run:
    checkpoint, seconds, planned = None, 0.0, record["steps"]
    if options.resume:
        checkpoint = last_checkpoint(output, record["processes"])
        seconds, planned = check_same_run(checkpoint, record)
    elif is_first():
        begin_afresh(output, options.overwrite_output_dir)
    return Run(output, options, record, evaluated, stop, checkpoint, seconds, planned)


def _trainer(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Any],
    eval_rows: Sequence[Any],
    run: Run,
    objective: Objective | Preferred | None,
) -> Any:
    enable_trainer()
    if isinstance(objective, Preferred):
        for library in ("trl", "datasets"):
            require(library, "train", "learning from preferences")
        from .preferences import preference_trainer

        return preference_trainer(model, tokenizer, rows, eval_rows, run, objective)
    from transformers import TrainingArguments

    from .trainer import Trainer, arguments, one_device

    if objective is None:
        objective = Answers(Collator(pad_token(tokenizer)), run.options.loss_chunk_size)
    args = one_device(TrainingArguments(**arguments(run)))
    return Trainer(model=model, args=args, objective=objective, rows=rows, eval_rows=eval_rows)


def _steps(
    run: Run, make: Callable[[], Any], callbacks: Sequence[Any], progress: Progress
) -> tuple[Any, float, bool]:
    """Train to the end or until ``run.stop``: (state of the trainer, seconds, whether it was stopped)."""
    from .trainer import Reporter, load

    trainer: Any = None
    try:
        with ExitStack() as stack, quiet_libraries():
            reporter = Reporter(run, progress, stack)
            trainer = make()
            reporter.join(trainer, callbacks)
            if run.checkpoint is not None and run.finished:
                load(trainer, run.checkpoint)
                reporter.evaluate_if_due(trainer.state)
                trainer.accelerator.wait_for_everyone()  # what is loaded may be removed next
            else:
                trainer.train(resume_from_checkpoint=run.checkpoint and str(run.checkpoint))
    except BaseException as error:
        _clear_away(run, trainer, error)
        raise
    return trainer.state, reporter.seconds(), reporter.stopped


def _clear_away(run: Run, trainer: Any, error: BaseException) -> None:
    """Remove the checkpoint that an error left half written.

    Raises:
        TrainingError: The error came from writing it.
    """
    place = run.output / f"checkpoint-{0 if trainer is None else trainer.state.global_step}"
    named = error.filename if isinstance(error, OSError) and isinstance(error.filename, str) else ""
    not_made = bool(named) and Path(named).is_relative_to(place) and not place.is_dir()
    half = place.is_dir() and not (place / RUN_NAME).exists()
    if not (not_made or half or isinstance(error, HalfMovedError)):
        return
    if is_first() and half:
        remove_checkpoint(place)
    if isinstance(error, Exception):
        raise TrainingError(
            f"the checkpoint {place} cannot be written: {reason(error)}. The run stopped after step "
            f"{trainer.state.global_step}; earlier checkpoints are whole, and ",
            Hint("resume", True),
            " continues from the last one",
        ) from error


def _metrics(run: Run, model: Any, state: Any, seconds: float) -> dict[str, Any]:
    from .trainer import evaluations

    metrics = {
        "steps": state.global_step,
        "seconds": round(seconds, 2),
        "tokens": int(state.num_input_tokens_seen or 0),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "processes": run.record["processes"],
        "options": dataclasses.asdict(run.options),
        "losses": [
            {name: entry[name] for name in ("step", "loss", "learning_rate")}
            for entry in state.log_history
            if "loss" in entry
        ],
        "evaluations": evaluations(state.log_history),
    }
    if names := class_names(model):
        metrics["label_names"] = names
    return metrics


def class_names(model: Any) -> list[str]:
    """The names of a classifier's classes, by number; its head does not contain them."""
    if not any(c.task_type == "SEQ_CLS" for c in getattr(model, "peft_config", {}).values()):
        return []
    return [name for _, name in sorted(model.get_base_model().config.id2label.items())]


def _write(run: Run, model: Any, tokenizer: Any, metrics: dict[str, Any]) -> None:
    """Write the adapter, then tokenizer and metrics, and last the record.

    Without ``save_steps`` the checkpoints are removed.
    """
    # TRL's trainers for DPO and KTO add an adapter of their own, as the reference.
    adapters = list(run.record["adapters"])
    only = {"selected_adapters": adapters} if adapters else {}
    saved = False
    try:
        # All processes take part: a sharded model is gathered for the one that writes.
        model.save_pretrained(run.output, is_main_process=is_first(), **only)
        if not is_first():
            return
        saved = True
        write_files(run.output, {**tokenizer_files(tokenizer), METRICS_NAME: json_bytes(metrics)})
        write_json(run.output / RUN_NAME, run.record)
    except (OSError, CheckpointError) as error:
        last = checkpoints(run.output)
        if last:
            way = Text("once this is mended, ", Hint("resume", True), f" continues from {last[-1]}")
        elif saved:
            way = Text("the adapter alone is written")
        else:
            way = Text("what was learned is lost")
        raise TrainingError(
            f"the result cannot be written to {run.output}: {reason(error)}; ", way
        ) from error
    if not run.options.save_steps:
        for place in checkpoints(run.output):
            remove_checkpoint(place)
