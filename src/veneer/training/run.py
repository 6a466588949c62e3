"""A training run: `train` an adapted model on rows, or `fine_tune` a base on files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import Hint, Text, TrainingError, VeneerError
from ..integrations.transformers import enable_trainer
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
from .libraries import quiet_libraries, require
from .loading import accelerators, training_device
from .losses import Answers, Classes, Objective, Preferred, check_chunks
from .models import load_base, load_tokenizer
from .options import RunOptions, TrainOptions, check_names
from .paths import check_run
from .planning import Step, empty_model, estimate_memory, seconds_per_step
from .planning.memory import no_gradient
from .plots import can_plot, loss_picture
from .progress import Progress, Silent, waiting
from .resuming import (
    METRICS_NAME,
    RUN_NAME,
    Run,
    begin_afresh,
    check_same_run,
    checkpoints,
    finished_run,
    last_checkpoint,
    reason,
    remove_checkpoint,
    run_record,
    write_json,
)
from .saved_adapter import adapter_config, read_adapter, with_adapter
from .starting import adapted
from .stopping import Interrupted, Stop, stop_on_signals

#: What the curve of a run shows.
MEASURES = {
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
    options = dataclasses.replace(options, model=_absolute(options.model))
    records = _read(options, progress)
    tokenizer = (saved and own_tokenizer(saved.directory)) or load_tokenizer(options.model)
    rows, eval_rows, label_names = _encoded(options, records, tokenizer, classes, progress)
    torch.manual_seed(options.seed)  # a classifier's head is drawn while its base is loaded
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
        loss_picture(
            output / "loss.png",
            [entry["loss"] for entry in metrics["losses"]],
            "Training loss",
            held_out=[(entry["step"], entry["loss"]) for entry in metrics["evaluations"]],
            ylabel=MEASURES[options.purpose],
        )
    return metrics


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
    state, seconds, stopped = _steps(run, make, callbacks, progress)
    if stopped:
        place = run.output / f"checkpoint-{state.global_step}"
        raise Interrupted(state.global_step, state.max_steps, place)
    metrics = _metrics(run, model, state, seconds)
    _write(run, model, tokenizer, metrics)
    return metrics


def _absolute(name: str) -> str:
    """A directory's whole path; the id of a model on the hub as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _read(options: RunOptions, progress: Progress) -> list[Records]:
    """The records to train on and, if there are any, the held-out ones."""
    sources = [options.data, *([options.eval_data] if options.eval_data else [])]
    with waiting(progress, "Reading the data"):
        records = [read_records(source, options.purpose, options.column_names()) for source in sources]
    for part in records:
        progress.say(part.line())
    return records


def _encoded(
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
    """Start a run, or resume it from its last checkpoint."""
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

    existed = run.output.exists()
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
        if not existed and run.output.is_dir() and not any(run.output.iterdir()):
            run.output.rmdir()
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
    if not not_made and (not place.is_dir() or (place / RUN_NAME).exists()):
        return
    if is_first() and not not_made:
        remove_checkpoint(place)
    if isinstance(error, Exception):
        raise TrainingError(
            f"the checkpoint {place} cannot be written: {reason(error)}. The run stopped after step "
            f"{trainer.state.global_step}; earlier checkpoints are whole, and ",
            Hint("resume", True),
            " continues from the last one",
        ) from error


def _metrics(run: Run, model: Any, state: Any, seconds: float) -> dict[str, Any]:
    """What ``metrics.json`` holds, see `train`."""
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
    if names := _class_names(model):
        metrics["label_names"] = names
    return metrics


def _class_names(model: Any) -> list[str]:
    """The names of a classifier's classes, by number; its head does not contain them."""
    if not any(c.task_type == "SEQ_CLS" for c in getattr(model, "peft_config", {}).values()):
        return []
    return [name for _, name in sorted(model.get_base_model().config.id2label.items())]


def _write(run: Run, model: Any, tokenizer: Any, metrics: dict[str, Any]) -> None:
    """Write adapter, tokenizer, metrics and, last, the record.

    Without ``save_steps`` the checkpoints are removed.
    """
    # TRL's trainers for DPO and KTO add an adapter of their own, as the reference.
    adapters = list(run.record["adapters"])
    only = {"selected_adapters": adapters} if adapters else {}
    try:
        # All processes take part: a sharded model is gathered for the one that writes.
        model.save_pretrained(run.output, is_main_process=is_first(), **only)
        if not is_first():
            return
        tokenizer.save_pretrained(run.output)
        write_json(run.output / METRICS_NAME, metrics)
        write_json(run.output / RUN_NAME, run.record)
    except OSError as error:
        last = checkpoints(run.output)
        way = Text("what was learned is lost")
        if last:
            way = Text("make room and ", Hint("resume", True), f" continues from {last[-1]}")
        raise TrainingError(
            f"the result cannot be written to {run.output}: {reason(error)}; ", way
        ) from error
    if not run.options.save_steps:
        for place in checkpoints(run.output):
            remove_checkpoint(place)
