"""A whole run from its options: data, base, adapter, training, metrics and picture."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import TrainingError, VeneerError
from .data import (
    Collator,
    LabelCollator,
    Records,
    encode,
    encode_classification,
    encode_preferences,
    pack,
    packing_for,
    pad_token,
    read_records,
)
from .dpo import preference_trainer
from .loop import Making, train
from .models import check_output, load_base, load_tokenizer, refuse_file, require
from .objectives import Answers, Classes, Objective
from .options import TASKS, RunOptions
from .planning import Step, empty_model, estimate_memory, seconds_per_step
from .plots import can_plot, loss_picture
from .progress import Progress, Silent
from .starting import adapted
from .stopping import stop_on_signals
from .trainer import check_names, total_steps


@dataclass(frozen=True)
class Lesson:
    """What is learned from the data, encoded.

    Attributes:
        rows: To learn from.
        eval_rows: Held out.
        longest: Tokens of the longest row, as far as they were counted.
        label_names: Of classes, where the model is to name one.
        objective: Given the model: what a row is trained for; None where the trainer has its own.
        make_trainer: Another trainer than that of the objective.
        measure: What the loss is of.
    """

    rows: Sequence[Any]
    eval_rows: Sequence[Any]
    longest: int
    label_names: list[str] | None = None
    objective: Callable[[Any], Objective] | None = None
    make_trainer: Making | None = None
    measure: str = "loss per token of the answer"


def fine_tune(options: RunOptions, progress: Progress | None = None) -> dict[str, Any]:
    """Do a whole run, and leave adapter, tokenizer, ``metrics.json`` and ``loss.png`` in the output.

    In a distributed run (``torchrun``, ``accelerate launch``) every process calls it; the first one writes
    and reports.

    Returns:
        What ``metrics.json`` holds, see `train`.

    Raises:
        VeneerError: As its parts do; nothing is written then but whole checkpoints.
        Interrupted: SIGINT or SIGTERM came; a checkpoint lies in the output.
    """
    _refuse_sharding()
    require("transformers", "train", "training")
    first = os.environ.get("RANK", "0") == "0"
    progress = progress if progress is not None and first else Silent()
    check_names(options)
    output = Path(options.output)
    refuse_file(output)
    if Path(
        options.model
    ).is_dir():  # the adapter notes where its base is, for whoever stands elsewhere later
        options = dataclasses.replace(options, model=str(Path(options.model).resolve()))
    sources = [options.data, *([options.eval_data] if options.eval_data else [])]
    records = [read_records(source, options.purpose) for source in sources]
    for part in records:
        progress.say(part.line())
    tokenizer = load_tokenizer(options.model)
    lesson = _lesson(options, records, tokenizer, progress)
    base, _ = load_base(
        options.model, options.dtype, quantize=options.quantize, label_names=lesson.label_names
    )
    if first:
        progress.say(_estimate(options, lesson, base))
    torch.manual_seed(options.seed)
    objective = None if lesson.objective is None else lesson.objective(base)
    model = adapted(
        base,
        options.lora_config(),
        lesson.rows,
        objective,
        batch_size=options.batch_size,
        seed=options.seed,
        progress=progress,
    )
    trainable, total = model.get_nb_trainable_parameters()
    progress.say(f"Training {trainable:,} of {total:,} parameters ({trainable / total:.2%})")
    check_output(output)
    with stop_on_signals(progress.say) as stop:
        metrics = train(
            model,
            tokenizer,
            lesson.rows,
            output,
            options,
            progress,
            eval_rows=lesson.eval_rows,
            objective=objective,
            make_trainer=lesson.make_trainer,
            stop=stop,
        )
    if first and can_plot():
        loss_picture(
            output / "loss.png",
            [entry["loss"] for entry in metrics["losses"]],
            "Training loss",
            held_out=[(entry["step"], entry["loss"]) for entry in metrics["evaluations"]],
            ylabel=lesson.measure,
        )
    return metrics


def _refuse_sharding() -> None:
    """Refuse what a launcher was told and this does not do.

    Raises:
        TrainingError: Naming the variable that the launcher set.
    """
    for variable in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        if os.environ.get(variable, "").lower() == "true":
            raise TrainingError(
                f"{variable} asks for a model in shards, and here each process holds the whole model and "
                "shares the work. Launch without it (torchrun, accelerate launch --multi_gpu), or shard in a "
                "script of your own"
            )


def _estimate(options: RunOptions, lesson: Lesson, base: Any) -> str:
    """One line: about how long the run takes and how much memory, reckoned for its longest row."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = base
        if options.quantize:
            labels = None if lesson.label_names is None else len(lesson.label_names)
            model = empty_model(options.model, TASKS[options.task], num_labels=labels)
        found = estimate_memory(
            model,
            options.lora_config(),
            Step(
                # Of a pair both answers are read.
                batch_size=options.batch_size * (2 if options.method == "dpo" else 1),
                sequence_length=lesson.longest,
                gradient_checkpointing=options.gradient_checkpointing,
                gradient_accumulation_steps=options.gradient_accumulation_steps,
                optim=options.optim,
                quantize=options.quantize,
                loss_chunk_size=options.loss_chunk_size,
                device=device,
            ),
        )
        once = seconds_per_step(found, device=device, dtype=next(base.parameters()).dtype)
    except (VeneerError, RuntimeError, NotImplementedError) as error:
        return f"No estimate of time and memory: {str(error).splitlines()[0]}"
    steps = total_steps(len(lesson.rows), options, processes)
    seconds = steps * options.gradient_accumulation_steps * once
    time = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(seconds, 1):.0f} s"
    return (
        f"Estimate: {steps} steps in about {time}, {found.peak / 1e9:.2g} GB of memory at the peak"
        + (" in each process" if processes > 1 else "")
        + " (if all rows were as long as the longest)"
    )


def _lesson(options: RunOptions, records: Sequence[Records], tokenizer: Any, progress: Progress) -> Lesson:
    """Encode the data of a run, and say what became of them."""
    limit = getattr(tokenizer, "model_max_length", options.max_length)
    if limit < options.max_length:
        progress.say(f"The model takes {limit} tokens at most: that is the longest example.")
        options = dataclasses.replace(options, max_length=limit)
    return LESSONS[options.purpose](options, records, tokenizer, progress)


def _answers(options: RunOptions, records: Sequence[Records], tokenizer: Any, progress: Progress) -> Lesson:
    found = [encode(part, tokenizer, options.max_length) for part in records]
    _say_all(progress, found)
    rows, *held_out = [part.rows for part in found]
    if options.packing:
        packed = pack(rows, options.max_length)
        _say_all(progress, [packed])
        rows = packed.rows

    def objective(model: Any) -> Objective:
        pad = pad_token(tokenizer)
        collator = Collator(pad, packing_for(model)) if options.packing else Collator(pad)
        return Answers(collator, options.loss_chunk_size)

    return Lesson(rows, held_out[0] if held_out else [], _longest(rows), objective=objective)


def _classes(options: RunOptions, records: Sequence[Records], tokenizer: Any, progress: Progress) -> Lesson:
    training = encode_classification(records[0], tokenizer, options.max_length)
    names = training.label_names
    held_out = [encode_classification(part, tokenizer, options.max_length, names) for part in records[1:]]
    _say_all(progress, [training, *held_out])
    return Lesson(
        training.rows,
        held_out[0].rows if held_out else [],
        _longest(training.rows),
        label_names=names,
        objective=lambda model: Classes(LabelCollator(pad_token(tokenizer))),
        measure="loss per example",
    )


def _preferences(
    options: RunOptions, records: Sequence[Records], tokenizer: Any, progress: Progress
) -> Lesson:
    found = [encode_preferences(part, tokenizer, options.max_length) for part in records]
    _say_all(progress, found)
    return Lesson(
        found[0].rows,
        found[1].rows if found[1:] else [],
        options.max_length,
        make_trainer=lambda setup, callbacks: preference_trainer(
            setup, options.beta, options.max_length, callbacks
        ),
        measure="loss per pair",
    )


LESSONS: dict[str, Callable[[RunOptions, Sequence[Records], Any, Progress], Lesson]] = {
    "sft": _answers,
    "classification": _classes,
    "dpo": _preferences,
}


def _say_all(progress: Progress, found: Sequence[Any]) -> None:
    for part in found:
        for line in part.lines():
            progress.say(line)


def _longest(rows: Sequence[Any]) -> int:
    return max(len(row["input_ids"]) for row in rows)
