"""transformers' Trainer and TRL's, told what they do not know: our loss, our order, our checkpoints."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, Hint, TrainingError
from ..integrations.transformers import enable_trainer
from .objectives import Objective, evaluate
from .options import TrainOptions
from .resuming import RUN_NAME, checkpoints, complete_checkpoint, reason, remove_checkpoint, step_of
from .stopping import Interrupted, Stop


@dataclass
class Setup:
    """What a trainer is made of.

    Attributes:
        model: With trainable parameters.
        tokenizer: Its tokenizer.
        rows: To learn from.
        eval_rows: Held out; may be empty.
        output: Where checkpoints go.
        options: How to train.
        steps: Optimizer steps of the whole run.
        record: What tells this run from others, see `run_record`; written into each checkpoint.
        stop: Whether the run was asked to stop.
    """

    model: Any
    tokenizer: Any
    rows: Sequence[Any]
    eval_rows: Sequence[Any]
    output: Path
    options: TrainOptions
    steps: int
    record: dict[str, Any]
    stop: Stop


def arguments(setup: Setup) -> dict[str, Any]:
    """Our options as the arguments of transformers' TrainingArguments, which TRL's configurations are too."""
    from transformers import TrainingArguments

    options = setup.options
    names = {part.name for part in dataclasses.fields(TrainingArguments)}
    again = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    found = {
        "output_dir": str(setup.output),
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.gradient_accumulation_steps,
        "learning_rate": options.learning_rate,
        "num_train_epochs": options.epochs,
        "max_steps": -1 if options.max_steps is None else options.max_steps,
        "lr_scheduler_type": options.lr_scheduler_type,
        "warmup_steps": options.warmup_steps or math.ceil(options.warmup_ratio * setup.steps),
        "weight_decay": options.weight_decay,
        "max_grad_norm": options.max_grad_norm,
        "optim": options.optim,
        "seed": options.seed,
        # Each step, for the curve; what --logging-steps thins is what is reported elsewhere.
        "logging_steps": 1,
        # The filter would replace a loss that is no number by the mean of the others.
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if options.save_steps else "no",
        "save_steps": options.save_steps or 500,
        "include_num_input_tokens_seen": "non_padding",
        "disable_tqdm": True,
        "report_to": _integrations(options.report_to),
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "average_tokens_across_devices": True,
        "ddp_find_unused_parameters": False,
        "bf16": False,
        "fp16": False,
        again: options.gradient_checkpointing,
        f"{again}_kwargs": {"use_reentrant": False},
    }
    if "RANK" in os.environ and not torch.cuda.is_available():
        # Both: without the first, accelerate starts the group and then lets each process go its own way.
        found |= {"use_cpu": True, "ddp_backend": "gloo"}
    return found


def check_names(options: TrainOptions) -> None:
    """Refuse an optimizer or a place to report to that transformers does not know or has no library for.

    Raises:
        ConfigError: Naming the nearest ones that it knows.
        MissingExtraError: bitsandbytes is not installed.
    """
    from transformers.training_args import OptimizerNames

    known = [str(name.value) for name in OptimizerNames]
    if options.optim not in known:
        near = difflib.get_close_matches(options.optim, known, n=3) or known[:4]
        raise ConfigError(f"optim {options.optim!r} is unknown; near it: {', '.join(near)}")
    if "8bit" in options.optim.replace("torch_8bit", "") or options.optim.startswith("paged"):
        from .models import require

        require("bitsandbytes", "quant", f"the optimizer {options.optim}")
    _integrations(options.report_to)


def _integrations(report_to: str) -> list[str]:
    from transformers.integrations import get_available_reporting_integrations

    names = [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
    there = get_available_reporting_integrations()
    missing = [name for name in names if name not in there]
    if missing:
        raise ConfigError(
            Hint("report_to"),
            f": {', '.join(missing)} is not installed or unknown to transformers; installed: "
            f"{', '.join(there) or 'none of those that it knows'}",
        )
    return names


class Order:
    """Which rows make which batch: it follows from the seed and the epoch, for any number of processes.

    Each step takes ``batch_size * processes`` rows in a drawn order, of which this process has its part. The
    last step of an epoch may have fewer; a process without a row gets None in place of one.
    """

    def __init__(self, rows: int, batch_size: int, seed: int, rank: int = 0, processes: int = 1) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.rank, self.processes, self.epoch = rank, processes, 0

    def __len__(self) -> int:
        return math.ceil(self.rows / (self.batch_size * self.processes))

    def __iter__(self) -> Iterator[list[int | None]]:
        drawn = torch.Generator().manual_seed(self.seed + self.epoch)
        order: list[int] = torch.randperm(self.rows, generator=drawn).tolist()
        for start in range(0, self.rows, self.batch_size * self.processes):
            mine = start + self.rank * self.batch_size
            part = order[start : start + self.batch_size * self.processes]
            yield list(part[mine - start : mine - start + self.batch_size]) or [None]


class _Rows:
    """Rows by number; None is a row without loss."""

    def __init__(self, rows: Sequence[Any], objective: Objective) -> None:
        self.rows, self.blank = rows, objective.blank(rows[0])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int | None) -> Any:
        return self.blank if number is None else self.rows[number]


def objective_trainer(setup: Setup, objective: Objective, callbacks: Sequence[Any]) -> Any:
    """A Trainer of transformers for an objective."""
    from transformers import Trainer, TrainingArguments

    enable_trainer()

    class ObjectiveTrainer(keeping(Trainer)):  # type: ignore[misc]
        """Takes loss and order from us; the same numbers in one process and in several."""

        control: Any

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            # Gradients are averaged over the processes, so each one's part counts that often.
            total = objective.sums(model, inputs)["loss"]
            return total / num_items_in_batch.clamp(min=1) * self.accelerator.num_processes

        def get_batch_samples(self, epoch_iterator: Any, num_batches: int, *more: Any) -> Any:
            batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
            count = sum((objective.count(batch) for batch in batches), torch.zeros((), dtype=torch.long))
            return batches, self.accelerator.gather(count.to(self.args.device)).sum()

        def get_train_dataloader(self) -> Any:
            order = Order(
                len(setup.rows),
                setup.options.batch_size,
                setup.options.seed,
                self.args.process_index,
                self.args.world_size,
            )
            counter.order, counter.accumulated = order, setup.options.gradient_accumulation_steps
            rows: Any = _Rows(setup.rows, objective)
            sampler: Any = order
            return torch.utils.data.DataLoader(
                rows, batch_sampler=sampler, collate_fn=objective.collator, num_workers=0
            )

        def evaluate(self, *args: Any, **kwargs: Any) -> Any:
            inner = self.accelerator.unwrap_model(self.model)
            alone = self.args.world_size == 1
            asked = (lambda: setup.stop.asked) if alone else bool
            means = evaluate(inner, setup.eval_rows, objective, setup.options.batch_size, asked)
            if means is None:
                if not self.state.global_step:
                    raise Interrupted(0, setup.steps, None)
                self.control.should_save = self.control.should_training_stop = True
                return {}
            named = {f"eval_{name}": value for name, value in means.items()}
            self.log(dict(named))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
            return named

    counter = _epochs()
    trainer = ObjectiveTrainer(
        model=setup.model,
        args=one_device(TrainingArguments(**arguments(setup))),
        train_dataset=list(setup.rows),
        data_collator=objective.collator,
        callbacks=[counter],
    )
    # The loss comes divided by all that it falls on: nothing is left to divide by.
    trainer.model_accepts_loss_kwargs = True
    return ready(trainer, setup, callbacks)


def one_device(given: Any) -> Any:
    """Training arguments that take one device a process; several are for torchrun."""
    given._n_gpu = min(given.n_gpu, 1)
    return given


def _epochs() -> Any:
    from transformers import TrainerCallback

    class Epochs(TrainerCallback):
        """Tells the order which epoch begins; it follows from the steps that are done."""

        order: Order | None = None
        accumulated = 1

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert self.order is not None
            self.order.epoch = state.global_step // math.ceil(len(self.order) / self.accumulated)

    return Epochs()


def keeping(base: type) -> type:
    """A Trainer class whose checkpoints are whole or not there, and say which run they belong to."""

    class Keeping(base):
        setup: Setup
        clock: Any
        control: Any

        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            place = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            try:
                if self.args.should_save:
                    (place / RUN_NAME).unlink(missing_ok=True)
                super()._save_checkpoint(*args, **kwargs)
                self.accelerator.wait_for_everyone()  # each process writes a file of its own
                if self.args.should_save:
                    complete_checkpoint(place, self.setup.record, self.clock())
                    self._remove_old()
            except BaseException as error:
                if self.args.should_save:
                    remove_checkpoint(place)
                if not isinstance(error, Exception):
                    raise
                raise TrainingError(
                    f"the checkpoint {place} cannot be written: {reason(error)}. The run stopped after step "
                    f"{self.state.global_step}; earlier checkpoints are whole, and ",
                    Hint("resume", True),
                    " goes on from the last one",
                ) from error

        def _remove_old(self) -> None:
            """Not the Trainer's way, which may be killed half-way and removes before the new one is whole."""
            written = [p for p in checkpoints(self.setup.output) if step_of(p) <= self.state.global_step]
            for place in written[: -self.setup.options.save_total_limit]:
                remove_checkpoint(place)

    return Keeping


def ready(trainer: Any, setup: Setup, callbacks: Sequence[Any]) -> Any:
    """The trainer with our callbacks, reporting elsewhere as often as the options say."""
    from transformers import PrinterCallback
    from transformers.integrations import INTEGRATION_TO_CALLBACK

    # It prints every log entry to standard output, which is for results.
    trainer.remove_callback(PrinterCallback)
    handler = trainer.callback_handler
    elsewhere = tuple(INTEGRATION_TO_CALLBACK.values())
    handler.callbacks = [
        Thinned(one, setup.options.logging_steps) if isinstance(one, elsewhere) else one
        for one in handler.callbacks
    ]
    trainer.setup = setup
    for one in callbacks:
        one.trainer = trainer
        trainer.add_callback(one)
    return trainer


class Thinned:
    """A callback that hears of the loss only every so many steps, and then of their mean."""

    def __init__(self, callback: Any, every: int) -> None:
        self._callback, self._every = callback, every

    def __getattr__(self, name: str) -> Any:
        return getattr(self._callback, name)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> Any:
        """Pass on what is no loss at once, and losses when they are due."""
        if logs and "loss" in logs:
            if state.global_step % self._every and state.global_step != state.max_steps:
                return None
            begun = (state.global_step - 1) // self._every * self._every
            window = [e["loss"] for e in state.log_history if "loss" in e and e["step"] > begun]
            logs = {**logs, "loss": sum(window) / len(window)}
        return self._callback.on_log(args, state, control, logs=logs, **kwargs)


def total_steps(rows: int, options: TrainOptions, processes: int) -> int:
    """Optimizer steps of a run, as the Trainer counts them."""
    if options.max_steps is not None:
        return options.max_steps
    batches = math.ceil(rows / (options.batch_size * processes))
    return math.ceil(options.epochs * max(math.ceil(batches / options.gradient_accumulation_steps), 1))
