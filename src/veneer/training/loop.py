"""One training run: transformers' Trainer does the looping, and reports to a `Progress`."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..errors import Hint, TrainingError
from .chunks import check_chunks
from .data import Collator, pad_token
from .models import quiet_transformers, require
from .objectives import Answers, Objective
from .options import TrainOptions
from .progress import Progress, Silent
from .resuming import (
    METRICS_NAME,
    RUN_NAME,
    begin_afresh,
    check_same_run,
    checkpoints,
    finished_run,
    last_checkpoint,
    reason,
    remove_checkpoint,
    run_record,
    step_of,
    write_json,
)
from .stopping import Interrupted, Stop
from .trainer import Setup, check_names, objective_trainer, total_steps

#: Makes a trainer of a setup and callbacks.
Making = Callable[[Setup, Sequence[Any]], Any]


def train(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Any],
    output: str | os.PathLike[str],
    options: TrainOptions | None = None,
    progress: Progress | None = None,
    *,
    eval_rows: Sequence[Any] = (),
    objective: Objective | None = None,
    make_trainer: Making | None = None,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Train an adapted model on token rows, and save the adapter and the tokenizer.

    With ``options.resume`` a run that was cut off goes on from its last checkpoint, to the losses that it
    would have had. One that has reached its last step is not trained; what is missing is written. One that is
    to have more steps now goes on to them.

    Args:
        model: From `get_peft_model` (or any model of transformers with trainable parameters).
        tokenizer: Saved along; its padding token fills batches.
        rows: From `encode`, or what the objective's collator takes.
        output: Directory for the adapter, checkpoints, ``metrics.json`` and the tokenizer.
        options: How to train.
        progress: Where to report loss and time left.
        eval_rows: Held-out rows; their loss is taken before the first step, after the last, and between them
            as often as the options say.
        objective: What a row is trained for; the tokens of the answers where None.
        make_trainer: Another trainer than that of the objective.
        stop: Asked after each step whether to go on.

    Returns:
        What ``metrics.json`` holds: ``losses`` (step, loss, learning rate), ``evaluations`` (step, loss, …),
        ``steps``, ``seconds``, ``tokens`` seen without padding, ``trainable`` parameters, ``options``. Of
        several processes the first one writes.

    Raises:
        ConfigError: An option that transformers does not know.
        TrainingError: Nothing is trainable, the loss stopped being a number, a checkpoint cannot be written,
            or there is nothing to resume from, or only another run.
        Interrupted: It was asked to stop; a checkpoint lies in the output.
    """
    require("transformers", "train", "training")
    require("accelerate", "train", "training")
    options = TrainOptions() if options is None else options
    progress = Silent() if progress is None else progress
    check_names(options)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not trainable:
        raise TrainingError(
            "no parameter of the model is trainable: a saved adapter is loaded for training with "
            "is_trainable=True"
        )
    if options.loss_chunk_size:
        check_chunks(model)
    answers = Answers(Collator(pad_token(tokenizer)), options.loss_chunk_size)
    chosen = answers if objective is None else objective
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    steps = total_steps(len(rows), options, processes)
    setup = Setup(
        model=model,
        tokenizer=tokenizer,
        rows=rows,
        eval_rows=eval_rows,
        output=Path(output),
        options=options,
        steps=steps,
        record=run_record(model, rows, eval_rows, options, processes, steps),
        stop=Stop() if stop is None else stop,
    )
    if options.resume and (metrics := finished_run(setup.output, setup.record)) is not None:
        progress.say(f"The run in {setup.output} is finished: nothing is left to train.")
        return metrics
    begun = _beginning(setup, processes)
    if begun.finished:
        progress.say(f"The run has reached its last step, {steps}: nothing is left to train, only to write.")
    elif begun.steps < steps:
        progress.say(
            f"The run was to have {begun.steps} steps and goes on to {steps}. From here the learning rate "
            f"follows the {options.lr_scheduler_type} schedule of {steps} steps."
        )
    reporter = _reporter(progress, setup, begun)
    setup_is_new = not setup.output.exists()
    try:
        with ExitStack() as stack, quiet_transformers():
            reporter.stack = stack
            trainer = (make_trainer or _of_objective(chosen))(setup, [reporter])
            trainer.clock = reporter.seconds
            if begun.finished:
                _load(trainer, str(begun.checkpoint))
                reporter.evaluate_if_due(trainer.state)
                trainer.accelerator.wait_for_everyone()  # what is loaded may be removed next
            else:
                trainer.train(resume_from_checkpoint=begun.checkpoint and str(begun.checkpoint))
    except BaseException:
        if setup_is_new and setup.output.is_dir() and not any(setup.output.iterdir()):
            setup.output.rmdir()
        raise
    state = trainer.state
    unfinished = state.global_step < state.max_steps or reporter.lacks_evaluation(state)
    if unfinished and setup.stop.anywhere():
        place = setup.output / f"checkpoint-{state.global_step}"
        raise Interrupted(state.global_step, state.max_steps, place)
    metrics = {
        "steps": state.global_step,
        "seconds": round(reporter.seconds(), 2),
        "tokens": int(state.num_input_tokens_seen or 0),
        "trainable": trainable,
        "processes": processes,
        "options": dataclasses.asdict(options),
        "losses": [
            {"step": entry["step"], "loss": entry["loss"], "learning_rate": entry["learning_rate"]}
            for entry in state.log_history
            if "loss" in entry
        ],
        "evaluations": _evaluations(state.log_history),
    }
    if names := _classes(model):
        metrics["label_names"] = names
    if trainer.is_world_process_zero():
        _write(setup, metrics)
    return metrics


def _classes(model: Any) -> list[str]:
    """Names of a classifier's classes in the order of their numbers: its head alone does not tell them."""
    if not any(c.task_type == "SEQ_CLS" for c in getattr(model, "peft_config", {}).values()):
        return []
    return [name for _, name in sorted(model.get_base_model().config.id2label.items())]


def _of_objective(objective: Objective) -> Making:
    return lambda setup, callbacks: objective_trainer(setup, objective, callbacks)


@dataclasses.dataclass(frozen=True)
class _Beginning:
    """Where a run begins.

    Attributes:
        checkpoint: What it goes on from.
        seconds: Spent before.
        steps: Those that the run was to have when the checkpoint was written.
        finished: The last step is done.
    """

    checkpoint: Path | None
    seconds: float
    steps: int
    finished: bool


def _beginning(setup: Setup, processes: int) -> _Beginning:
    if setup.options.resume:
        checkpoint = last_checkpoint(setup.output, processes)
        seconds, steps = check_same_run(checkpoint, setup.record)
        return _Beginning(checkpoint, seconds, steps, finished=step_of(checkpoint) >= setup.steps)
    if os.environ.get("RANK", "0") == "0":
        begin_afresh(setup.output, setup.options.overwrite_output_dir)
    return _Beginning(None, 0.0, setup.steps, finished=False)


def _load(trainer: Any, checkpoint: str) -> None:
    """The weights and the history of a checkpoint after which there is nothing to train.

    The Trainer's loop has no such case: it takes one step more and then asks whether that was the last.
    """
    from transformers import TrainerState

    trainer.state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
    trainer._load_from_checkpoint(checkpoint)


def _write(setup: Setup, metrics: dict[str, Any]) -> None:
    """Adapter, tokenizer, metrics, then whose they are; checkpoints that nobody asked for are removed."""
    try:
        # A trainer may have put an adapter of its own beside ours.
        only = {"selected_adapters": list(setup.record["adapters"])} if setup.record["adapters"] else {}
        setup.model.save_pretrained(setup.output, **only)
        setup.tokenizer.save_pretrained(setup.output)
        write_json(setup.output / METRICS_NAME, metrics)
        write_json(setup.output / RUN_NAME, setup.record)
    except OSError as error:
        last = checkpoints(setup.output)
        way = (
            ["make room and ", Hint("resume", True), f" goes on from {last[-1]}"]
            if last
            else ["what was learned is lost"]
        )
        raise TrainingError(
            f"the result cannot be written to {setup.output}: {reason(error)}; ", *way
        ) from error
    if not setup.options.save_steps:
        for place in checkpoints(setup.output):
            remove_checkpoint(place)


def _evaluations(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    kept = ("loss", "accuracy", "rewards/accuracies", "rewards/margins")
    return [
        {"step": entry["step"], **{name: entry[f"eval_{name}"] for name in kept if f"eval_{name}" in entry}}
        for entry in history
        if "eval_loss" in entry
    ]


def _reporter(progress: Progress, setup: Setup, beginning: _Beginning) -> Any:
    """A callback for progress, evaluation, stopping, and losses that are no number."""
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        stack: ExitStack
        trainer: Any

        def __init__(self) -> None:
            self.begun = time.monotonic()
            self.working = 0.0

        def seconds(self) -> float:
            """Of the whole run, also before its last checkpoint."""
            return beginning.seconds + time.monotonic() - self.begun

        def on_train_begin(
            self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any
        ) -> None:
            self.tokens = state.num_input_tokens_seen or 0
            # What the checkpoint says of these goes before what the options say now.
            state.save_steps = args.save_steps
            if beginning.steps < setup.steps:
                lr_scheduler.last_epoch -= 1
                lr_scheduler.step()
            self.evaluate_if_due(state)
            self.advance = self.stack.enter_context(progress.bar("training", state.max_steps))
            self.advance(state.global_step, "")

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.step_begun = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            self.working += time.monotonic() - self.step_begun
            if state.global_step < state.max_steps and setup.stop.anywhere():
                control.should_save = control.should_training_stop = True
                control.should_evaluate = False
            else:
                control.should_evaluate = self.lacks_evaluation(state)
            return control

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            told = logs or {}
            if "eval_loss" in told:
                measures = [f"held-out loss {told['eval_loss']:.3f}"]
                if "eval_accuracy" in told:
                    measures.append(f"accuracy {told['eval_accuracy']:.1%}")
                progress.say(f"  step {state.global_step}: {', '.join(measures)}")
            if "loss" not in told:
                return
            if not math.isfinite(told["loss"]):
                raise TrainingError(
                    f"the loss became {told['loss']} at step {state.global_step}: lower the learning rate "
                    f"(it is {args.learning_rate:g}), or train in bfloat16 or float32 instead of float16"
                )
            rate = ((state.num_input_tokens_seen or 0) - self.tokens) / max(self.working, 1e-9)
            self.advance(1, f"loss {told['loss']:.3f}, {rate:,.0f} tokens/s")

        def lacks_evaluation(self, state: Any) -> bool:
            every, step = setup.options.eval_steps, state.global_step
            due = step in (0, state.max_steps) or bool(every and step % every == 0)
            known = [entry["step"] for entry in state.log_history if "eval_loss" in entry]
            return bool(setup.eval_rows) and due and step not in known

        def evaluate_if_due(self, state: Any) -> None:
            """Before the first step, and where a run was cut off between a step and its evaluation."""
            if self.lacks_evaluation(state):
                self.trainer.evaluate()

    return Reporter()
