"""A training run: `fine_tune` a base on files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import VeneerError
from ..wording import first_line, size
from .adapters import own_tokenizer
from .data import (
    Collator,
    EncodedLabels,
    LabelCollator,
    Records,
    pack,
    packing_for,
    pad_token,
    read_records,
)
from .data.rows import encode_records, longest_example, set_aside
from .launcher import check_launcher, is_first, is_sharded, launched, processes
from .libraries import require
from .loading import accelerators, training_device
from .losses import Answers, Classes, Objective, Preferred
from .models import load_base, load_tokenizer
from .options import RunOptions, check_names
from .paths import check_run
from .planning import Step, empty_model, estimate_memory, seconds_per_step
from .planning.memory import no_gradient
from .plots import can_plot, loss_picture, said_if_not_written
from .progress import Progress, Silent, waiting
from .saved_adapter import adapter_config, read_adapter, with_adapter
from .starting import adapted
from .stopping import stop_on_signals
from .train_rows import train

#: What the curve of a run shows.
LOSSES = {
    "sft": "loss per token of the answer",
    "classification": "loss per example",
    "dpo": "loss per pair",
    "kto": "loss per answer",
}


def fine_tune(options: RunOptions, progress: Progress | None = None) -> dict[str, Any]:
    """Do a whole run: read the data, load the base, train, and write adapter, tokenizer, metrics and picture.

    In a distributed run (``torchrun``, ``accelerate launch``) every process calls this; the first one writes
    and reports.

    Returns:
        What ``metrics.json`` holds, see `train`.

    Raises:
        VeneerError: Something is wrong with the options, the data or the model; only whole checkpoints are
            left in the output.
        Interrupted: SIGINT or SIGTERM came; a checkpoint lies in the output.
    """
    check_launcher()
    require("transformers", "train", "training")
    progress = progress if progress is not None and is_first() else Silent()
    check_names(options)
    output = Path(options.output)
    saved = classes = None
    if options.resume_from_adapter is not None:
        saved = read_adapter(options.resume_from_adapter)
        options, classes = with_adapter(options, saved), saved.classes()
    check_run(options)
    # Saved in the adapter's configuration, where a relative path would mean another place later.
    options = dataclasses.replace(options, model=absolute(options.model))
    records = read_all(options, progress)
    tokenizer = (saved and own_tokenizer(saved.directory)) or load_tokenizer(options.model)
    rows, eval_rows, label_names = encoded(options, records, tokenizer, classes, progress)
    torch.manual_seed(options.seed)  # a classifier's head is drawn while its base is loaded
    base = load_training_base(options, label_names, progress)
    for line in _about_devices(base):
        progress.say(line)
    if is_first():
        for line in _estimate(options, rows, label_names, base):
            progress.say(line)
    torch.manual_seed(options.seed)  # the estimate, which one process makes, may have drawn numbers
    objective = _objective(options, base, tokenizer)
    model = adapted(base, options, rows, objective, progress)
    trainable, total = model.get_nb_trainable_parameters()
    progress.say(f"Training {trainable:,} of {total:,} parameters ({trainable / total:.2%})")
    with stop_on_signals(progress.say) as stop:
        metrics = train(
            model,
            tokenizer,
            rows,
            output,
            options,
            progress,
            eval_rows=eval_rows,
            objective=objective,
            stop=stop,
        )
    if is_first() and can_plot():
        with said_if_not_written(progress):
            loss_picture(
                output / "loss.png",
                [entry["loss"] for entry in metrics["losses"]],
                "Training loss",
                held_out=[(entry["step"], entry["loss"]) for entry in metrics["evaluations"]],
                ylabel=LOSSES[options.purpose],
            )
    return metrics


def absolute(name: str) -> str:
    """A directory's whole path; the id of a model on the hub as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def read_all(options: RunOptions, progress: Progress) -> list[Records]:
    """The records to train on and, if there are any, the held-out ones."""
    sources = [options.data, *([options.eval_data] if options.eval_data else [])]
    with waiting(progress, "Reading the data"):
        records = [read_records(source, options.purpose, options.column_names()) for source in sources]
    for part in records:
        progress.say(part.line())
    return records


def encoded(
    options: RunOptions,
    records: Sequence[Records],
    tokenizer: Any,
    names: list[str] | None,
    progress: Progress,
) -> tuple[Sequence[Any], Sequence[Any], list[str] | None]:
    """Tokenise the records: (rows, held-out rows, names of classes).

    Args:
        names: Of the classes that an adapter knows already.
    """
    length = longest_example(tokenizer, options.max_length)
    if length < options.max_length:
        progress.say(f"The model takes at most {length} tokens: longer examples are cut.")
    found = []
    for part in records:
        found.append(encode_records(part, tokenizer, length, options.method, names))
        if isinstance(found[0], EncodedLabels):
            names = found[0].label_names
    if options.method == "reward":
        names = ["reward"]
    for line in (line for part in found for line in part.lines()):
        progress.say(line)
    rows: Sequence[Any] = found[0].rows
    eval_rows: Sequence[Any] = found[1].rows if len(found) > 1 else []
    if options.validation_split:
        rows, eval_rows = set_aside(rows, options.validation_split, options.seed)
        progress.say(
            f"{len(eval_rows)} of them are set aside for validation, drawn by the seed {options.seed}"
        )
    if options.packing:
        packed = pack(rows, length)
        for line in packed.lines():
            progress.say(line)
        rows = packed.rows
    return rows, eval_rows, names


def _objective(options: RunOptions, base: Any, tokenizer: Any) -> Objective | Preferred:
    if options.method != "sft":
        # A reward is one of a whole answer: longer ones are left out, and none is cut.
        length = None if options.method == "reward" else options.max_length
        return Preferred(options.method, options.beta, length)
    pad = pad_token(tokenizer)
    if options.purpose == "classification":
        return Classes(LabelCollator(pad))
    collator = Collator(pad, packing_for(base)) if options.packing else Collator(pad)
    return Answers(collator, options.loss_chunk_size)


def load_training_base(options: RunOptions, label_names: list[str] | None, progress: Progress) -> Any:
    """The base of a run, on the device that trains it.

    Raises:
        TrainingError: It cannot be loaded.
    """
    # Straight onto the device that trains it: not every process of a machine holds it on the CPU first.
    place = None if is_sharded() else training_device()
    base, _ = load_base(
        options.model,
        options.dtype,
        quantize=options.quantize,
        device_map=None if place is None else {"": str(place)},
        attn_implementation=options.attn_implementation,
        label_names=label_names,
        progress=progress,
    )
    return base


def _about_devices(base: Any) -> Iterator[str]:
    """What to say of GPUs that stay idle, and of weights that are wider than they need to be."""
    there = accelerators()
    if len(there) > 1 and not launched():
        launch = f"torchrun --nproc-per-node {len(there)} -m veneer train …"
        yield f"Training on one of {len(there)} GPUs; to use them all: {launch}"
    if there and base.dtype == torch.float32:
        yield (
            f"The base's weights are float32. In bfloat16 (dtype bfloat16) they take half the memory, and "
            f"{there[0].type} multiplies them several times faster."
        )


def _estimate(
    options: RunOptions, rows: Sequence[Any], label_names: list[str] | None, base: Any
) -> Iterator[str]:
    """Time and memory of the run, as if every row were as long as the longest, and what gets no gradient."""
    from .trainer import total_steps

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pairs = options.method != "sft"
    if is_sharded():
        yield "No estimate of time and memory for a model in shards."
        return
    try:
        model = base
        if options.quantize:
            labels = None if label_names is None else len(label_names)
            model = empty_model(options.model, options.task_type, num_labels=labels)
        found = estimate_memory(
            model,
            adapter_config(options),
            Step.of(
                options,
                batch_size=options.batch_size * (2 if pairs else 1),  # two answers are read for each row
                sequence_length=options.max_length if pairs else max(len(row["input_ids"]) for row in rows),
                device=device,
            ),
        )
        once = seconds_per_step(found, device=device, dtype=next(base.parameters()).dtype)
    except (VeneerError, RuntimeError, NotImplementedError) as error:
        yield f"No estimate of time and memory: {first_line(error)}"
        return
    steps = total_steps(len(rows), options, processes())
    seconds = steps * options.gradient_accumulation_steps * once
    time = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(seconds, 1):.0f} s"
    yield (
        f"Estimate: {steps} steps in about {time}, {size(found.peak)} of memory at the peak"
        + (" in each process" if processes() > 1 else "")
        + " (if all rows were as long as the longest)"
    )
    if found.unreached:
        yield f"warning: {no_gradient(found.unreached)}"
