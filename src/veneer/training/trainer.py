"""transformers' Trainer with the loss of an `Objective`, and the callback that reports and evaluates."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK

from ..errors import TrainingError
from .data import IGNORED
from .launcher import launched
from .losses import Classes, Objective
from .options import TrainOptions, trackers
from .progress import Progress
from .resuming import Run, checkpoints, complete_checkpoint, remove_checkpoint, step_of

#: What is kept of an evaluation, where it is measured.
MEASURES = ("loss", "accuracy", "rewards/accuracies", "rewards/margins", "margin", "kl")


class Trainer(transformers.Trainer):
    """transformers' Trainer with the loss of an objective.

    Args:
        objective: Makes batches of rows, and their loss.
        rows: Rows to train on.
        eval_rows: Held-out rows; may be empty.
        more: Further arguments of transformers' Trainer.
    """

    def __init__(
        self, *, objective: Objective, rows: Sequence[Any], eval_rows: Sequence[Any], **more: Any
    ) -> None:
        self.objective = objective
        self.args = more["args"]
        super().__init__(
            train_dataset=list(rows),
            eval_dataset=self._full_batches(eval_rows),
            data_collator=objective.collator,
            compute_metrics=_accuracy if isinstance(objective, Classes) else None,
            **more,
        )
        # The Trainer then counts the labels of a step over all batches and processes, to divide the loss by.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The share of one batch in the mean over all tokens of a step or of an evaluation."""
        total, outputs = self.objective.loss(model, inputs)
        if model.training:
            # Gradients are averaged over the processes, so each one's part counts that often.
            loss = total * self.accelerator.num_processes / num_items_in_batch.clamp(min=1)
        else:
            # The Trainer averages over rows: dividing by the average labels of a row gives the mean over
            # tokens.
            loss = total / (len(inputs["labels"]) * self.items_per_row)
        return (loss, outputs) if return_outputs else loss

    def _full_batches(self, rows: Sequence[Any]) -> list[Any]:
        """The rows by length, filled up with rows without labels so that every process has full batches."""
        if not rows:
            return []
        ordered = sorted(rows, key=lambda row: -len(row["input_ids"]))
        labels = ordered[-1]["labels"]
        blank = {**ordered[-1], "labels": [IGNORED] * len(labels) if isinstance(labels, list) else IGNORED}
        full = [*ordered, *[blank] * (-len(rows) % (self.args.eval_batch_size * self.args.world_size))]
        counted = (self.objective.collator([row])["labels"] != IGNORED for row in rows)
        self.items_per_row = sum(int(one.sum()) for one in counted) / len(full)
        if not self.items_per_row:
            raise TrainingError("no held-out row has a label: there is no loss to evaluate")
        return full


def _accuracy(predicted: Any) -> dict[str, float]:
    counted = predicted.label_ids != IGNORED
    right = predicted.predictions.argmax(-1) == predicted.label_ids
    return {"accuracy": float(right[counted].mean())}


def arguments(run: Run) -> dict[str, Any]:
    """The options as arguments of TrainingArguments, which TRL's configurations extend."""
    options = run.options
    names = {part.name for part in dataclasses.fields(TrainingArguments)}
    again = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    found = {
        "output_dir": str(run.output),
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.gradient_accumulation_steps,
        "learning_rate": options.learning_rate,
        "num_train_epochs": options.epochs,
        "max_steps": -1 if options.max_steps is None else options.max_steps,
        "lr_scheduler_type": options.lr_scheduler_type,
        "warmup_steps": options.warmup_steps or math.ceil(options.warmup_ratio * run.steps),
        "weight_decay": options.weight_decay,
        "max_grad_norm": options.max_grad_norm,
        "optim": options.optim,
        "seed": options.seed,
        # Each step, for the curve; `logging_steps` thins what is reported elsewhere.
        "logging_steps": 1,
        # The filter would replace a loss that is no number by the mean of the others.
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if options.save_steps else "no",
        "save_steps": options.save_steps or 500,
        "include_num_input_tokens_seen": "non_padding",
        "disable_tqdm": True,
        "report_to": trackers(options.report_to),
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "dataloader_pin_memory": False,
        "average_tokens_across_devices": True,
        "ddp_find_unused_parameters": False,
        "bf16": False,
        "fp16": False,
        again: options.gradient_checkpointing,
        f"{again}_kwargs": {"use_reentrant": False},
    }
    if launched() and not torch.cuda.is_available():
        # Both: without the first, accelerate starts the group and then lets each process go its own way.
        found |= {"use_cpu": True, "ddp_backend": "gloo"}
    return found


def one_device(args: Any) -> Any:
    """Training arguments limited to one device for each process; torchrun starts more of them."""
    args._n_gpu = min(args.n_gpu, 1)
    return args


class Reporter(TrainerCallback):
    """Reports progress, evaluates, stops, completes checkpoints, and ends a run whose loss is no number."""

    def __init__(self, run: Run, progress: Progress, stack: ExitStack) -> None:
        self.run, self.progress, self.stack = run, progress, stack
        self.begun, self.working = time.monotonic(), 0.0
        self.stopped = False
        self.trainer: Any = None

    def join(self, trainer: Any, callbacks: Sequence[Any]) -> None:
        """Add this and further callbacks to a trainer."""
        # It prints the log to standard output, which is reserved for results.
        trainer.remove_callback(PrinterCallback)
        handler, every = trainer.callback_handler, self.run.options.logging_steps
        elsewhere = tuple(INTEGRATION_TO_CALLBACK.values())
        handler.callbacks = [
            Thinned(one, every) if isinstance(one, elsewhere) else one for one in handler.callbacks
        ]
        self.trainer = trainer
        for one in (self, *callbacks):
            trainer.add_callback(one)

    def seconds(self) -> float:
        """Time of the whole run, including what came before its checkpoint."""
        return self.run.seconds + time.monotonic() - self.begun

    def on_train_begin(
        self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any
    ) -> None:
        """Continue where the run was interrupted."""
        self.tokens = state.num_input_tokens_seen or 0
        # The Trainer takes this from the checkpoint, whatever the options are now.
        state.save_steps = args.save_steps
        if self.run.planned < self.run.steps:
            lr_scheduler.last_epoch -= 1
            lr_scheduler.step()
        if args.should_save:  # a later, incomplete checkpoint must not mix with the one written next
            for place in checkpoints(self.run.output):
                if step_of(place) > state.global_step:
                    remove_checkpoint(place)
        self.evaluate_if_due(state)
        self.advance: Callable[[int, str], None] = self.stack.enter_context(
            self.progress.bar("training", state.max_steps)
        )
        self.advance(state.global_step, "")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.step_begun = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Stop, with a checkpoint, if any process was asked to."""
        self.working += time.monotonic() - self.step_begun
        if self.run.stop.asked:
            self.trainer.accelerator.set_trigger()
        if state.global_step < state.max_steps and self.trainer.accelerator.check_trigger():
            control.should_save = control.should_training_stop = True
            self.stopped = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Report a step or an evaluation; after a step, evaluate where that is due."""
        logs = logs or {}
        if "eval_loss" in logs:
            measures = [f"held-out loss {logs['eval_loss']:.3f}"]
            if "eval_accuracy" in logs:
                measures.append(f"accuracy {logs['eval_accuracy']:.1%}")
            self.progress.say(f"  step {state.global_step}: {', '.join(measures)}")
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise TrainingError(
                f"the loss became {logs['loss']} at step {state.global_step}: lower the learning rate "
                f"(it is {args.learning_rate:g}), or train in bfloat16 or float32 instead of float16"
            )
        note = f"loss {logs['loss']:.3f}"
        if tokens := (state.num_input_tokens_seen or 0) - self.tokens:  # ORPO's trainer counts none
            note += f", {tokens / max(self.working, 1e-9):,.0f} tokens/s"
        self.advance(1, note)
        if not self.stopped:
            self.evaluate_if_due(state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the checkpoint as complete, and only then remove older ones."""
        self.trainer.accelerator.wait_for_everyone()  # each process writes a file of its own
        if args.should_save:
            place = self.run.output / f"checkpoint-{state.global_step}"
            complete_checkpoint(place, self.run.record, self.seconds())
            for old in checkpoints(self.run.output)[: -self.run.options.save_total_limit]:
                remove_checkpoint(old)

    def evaluate_if_due(self, state: Any) -> None:
        """Evaluate before the first step, after the last and every ``eval_steps``, unless already done.

        The random state is restored, so that evaluations do not change the losses of training.
        """
        every, step = self.run.options.eval_steps, state.global_step
        due = step in (0, state.max_steps) or bool(every and step % every == 0)
        known = [entry["step"] for entry in state.log_history if "eval_loss" in entry]
        if self.run.evaluated and due and step not in known:
            devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
            with torch.random.fork_rng(devices):
                self.trainer.evaluate()


class Thinned:
    """A callback that gets the loss only every so many steps, as their mean."""

    def __init__(self, callback: Any, every: int) -> None:
        self._callback, self._every = callback, every

    def __getattr__(self, name: str) -> Any:
        return getattr(self._callback, name)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> Any:
        """Pass on other logs at once, and losses when they are due."""
        if logs and "loss" in logs:
            if state.global_step % self._every and state.global_step != state.max_steps:
                return None
            begun = (state.global_step - 1) // self._every * self._every
            window = [e["loss"] for e in state.log_history if "loss" in e and e["step"] > begun]
            logs = {**logs, "loss": sum(window) / len(window)}
        return self._callback.on_log(args, state, control, logs=logs, **kwargs)


def load(trainer: Any, checkpoint: Path) -> None:
    """Load the weights and the history of a checkpoint after which there is nothing to train.

    The Trainer has no such case: resumed after its last step, it takes another one.
    """
    trainer.state = transformers.TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if trainer.is_fsdp_enabled:  # what was saved in shards is loaded into shards
        trainer.create_optimizer()
        trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.model_wrapped = trainer.model
    trainer._load_from_checkpoint(str(checkpoint), trainer.model)


def total_steps(rows: int, options: TrainOptions, processes: int) -> int:
    """Optimizer steps of a run, as the Trainer counts them."""
    if options.max_steps is not None:
        return options.max_steps
    batches = math.ceil(rows / (options.batch_size * processes))
    return math.ceil(options.epochs * max(math.ceil(batches / options.gradient_accumulation_steps), 1))


def evaluations(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """(step, loss, …) of each evaluation in a trainer's history."""
    return [
        {"step": entry["step"]}
        | {name: entry[f"eval_{name}"] for name in MEASURES if f"eval_{name}" in entry}
        for entry in history
        if "eval_loss" in entry
    ]
