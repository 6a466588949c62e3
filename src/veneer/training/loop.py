"""One training run: transformers' Trainer does the looping, and reports to a `Progress`."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, TrainingError
from .data import Collator, Row, pad_token
from .evaluate import loss_sum
from .models import quiet_transformers, require
from .progress import Progress, Silent


@dataclass(frozen=True)
class TrainOptions:
    """How to train; the names are transformers'.

    Attributes:
        learning_rate: Peak of the schedule.
        epochs: Passes over the data, where ``max_steps`` is None.
        max_steps: Optimizer steps.
        batch_size: Examples a forward pass.
        gradient_accumulation_steps: Forward passes an optimizer step.
        lr_scheduler: transformers' name of the schedule.
        warmup_steps: Steps from 0 up to the learning rate.
        weight_decay: Of AdamW.
        max_grad_norm: Gradients are scaled down to this norm.
        seed: Order of the data, dropout.
        save_steps: Steps from one checkpoint to the next; 0 writes none.
        resume: Go on from the last checkpoint of the output directory.
    """

    learning_rate: float = 2e-4
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    lr_scheduler: str = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    save_steps: int = 0
    resume: bool = False

    def __post_init__(self) -> None:
        wrong = [
            f"{name} must be {what}, not {value}"
            for name, value, good, what in (
                ("learning_rate", self.learning_rate, self.learning_rate > 0, "above 0"),
                ("epochs", self.epochs, self.epochs > 0, "above 0"),
                ("max_steps", self.max_steps, self.max_steps is None or self.max_steps > 0, "above 0"),
                ("batch_size", self.batch_size, self.batch_size > 0, "above 0"),
                (
                    "gradient_accumulation_steps",
                    self.gradient_accumulation_steps,
                    self.gradient_accumulation_steps > 0,
                    "above 0",
                ),
                ("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "0 or more"),
                ("save_steps", self.save_steps, self.save_steps >= 0, "0 or more"),
                ("weight_decay", self.weight_decay, self.weight_decay >= 0, "0 or more"),
            )
            if not good
        ]
        if wrong:
            raise ConfigError("; ".join(wrong))


def train(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    output: str | os.PathLike[str],
    options: TrainOptions | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train an adapted causal language model on token rows, and save the adapter and the tokenizer.

    Args:
        model: From `get_peft_model` (or any causal language model with trainable parameters).
        tokenizer: Saved along; its padding token fills batches.
        rows: From `encode`.
        output: Directory for the adapter, checkpoints, ``metrics.json`` and the tokenizer.
        options: How to train.
        progress: Where to report loss and time left.

    Returns:
        What ``metrics.json`` holds: ``losses`` (step, loss, learning rate), ``steps``, ``seconds``,
        ``tokens`` seen, ``trainable`` parameters, ``options``.

    Raises:
        TrainingError: Nothing is trainable, the loss stopped being a number, or there is nothing to resume.
    """
    require("transformers", "train", "training")
    require("accelerate", "train", "training")
    options = TrainOptions() if options is None else options
    progress = Silent() if progress is None else progress
    output = Path(output)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not trainable:
        raise TrainingError(
            "no parameter of the model is trainable: a saved adapter is loaded for training with "
            "is_trainable=True"
        )
    collator = Collator(pad_token(tokenizer))
    checkpoint = _last_checkpoint(output) if options.resume else None
    begun = time.monotonic()
    with ExitStack() as stack:
        trainer = _trainer(model, rows, collator, output, options, _reporter(progress, stack))
        stack.enter_context(quiet_transformers())
        trainer.train(resume_from_checkpoint=checkpoint)
    metrics = {
        "steps": trainer.state.global_step,
        "seconds": round(time.monotonic() - begun, 2),
        "tokens": int(trainer.state.num_input_tokens_seen or 0),
        "trainable": trainable,
        "options": asdict(options),
        "losses": [
            {"step": entry["step"], "loss": entry["loss"], "learning_rate": entry["learning_rate"]}
            for entry in trainer.state.log_history
            if "loss" in entry
        ],
    }
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    write_json(output / "metrics.json", metrics)
    return metrics


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, the whole file or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def _last_checkpoint(output: Path) -> str:
    """The newest checkpoint that was written to its end: its state is among the last files."""
    numbers = {
        int(place.name.removeprefix("checkpoint-")): place
        for place in output.glob("checkpoint-*")
        if place.name.removeprefix("checkpoint-").isdigit()
    }
    whole = [n for n in sorted(numbers) if _is_json(numbers[n] / "trainer_state.json")]
    if not whole:
        raise TrainingError(
            f"nothing to resume: {output} holds no {'complete ' if numbers else ''}checkpoint. Start without "
            "--resume; --save-steps N writes one every N steps."
        )
    return str(numbers[whole[-1]])


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # the run was cut off before or while it wrote it
        return False
    return True


def _trainer(
    model: Any,
    rows: Sequence[Row],
    collator: Collator,
    output: Path,
    options: TrainOptions,
    reporter: Any,
) -> Any:
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from ..integrations.transformers import enable_trainer

    enable_trainer()

    class AnswerTrainer(Trainer):
        """Trainer whose loss computes logits only where there are answers."""

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            total, count = loss_sum(self.accelerator.unwrap_model(model), inputs)
            if num_items_in_batch is None:
                return total / count
            share = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            return total / num_items_in_batch * share

    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        learning_rate=options.learning_rate,
        num_train_epochs=options.epochs,
        max_steps=-1 if options.max_steps is None else options.max_steps,
        lr_scheduler_type=options.lr_scheduler,
        warmup_steps=options.warmup_steps,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        seed=options.seed,
        logging_steps=1,
        # The filter would replace a loss that is no number by the mean of the others.
        logging_nan_inf_filter=False,
        save_strategy="steps" if options.save_steps else "no",
        save_steps=options.save_steps or 500,
        save_total_limit=2,
        include_num_input_tokens_seen="all",
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = AnswerTrainer(
        model=model,
        args=arguments,
        train_dataset=list(rows),
        data_collator=collator,
        callbacks=[reporter],
    )
    # It prints every log entry to standard output, which is for results.
    trainer.remove_callback(PrinterCallback)
    return trainer


def _reporter(progress: Progress, stack: ExitStack) -> Any:

    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        """Feeds the progress bar, and stops a run whose loss is no number."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.advance = stack.enter_context(progress.bar("training", state.max_steps))
            self.advance(state.global_step, "")

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            loss = (logs or {}).get("loss")
            if loss is None:
                return
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss became {loss} at step {state.global_step}: lower the learning rate "
                    f"(it is {args.learning_rate:g}), or train in bfloat16 or float32 instead of float16"
                )
            self.advance(1, f"loss {loss:.3f}")

    return Reporter()
