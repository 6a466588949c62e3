"""``veneer plan``: what a training run would adapt and need, before anything is downloaded or trained."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from ..training.options import RunOptions, option
from ..training.paths import check_model
from ..training.planning.limits import parse_budget
from ..training.progress import Terminal
from ..training.saved_adapter import adapter_config
from ..wording import listed, ranges, size
from .common import app, by_kind, flags_of, load_libraries, show_json
from .fields import options_of, with_flags
from .messages import in_flags

if TYPE_CHECKING:
    from rich.console import Console

    from ..training.planning import PlanReport

#: Option of a run -> what `propose` may change unless it is given.
CHANGEABLE = {
    "lora_r": "r",
    "lora_target_modules": "target_modules",
    "quantize": "quantize",
    "batch_size": "batch_size",
    "gradient_checkpointing": "gradient_checkpointing",
    "loss_chunk_size": "loss_chunk_size",
}
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class PlanOptions(RunOptions):
    """The options of a run of which only the model has to be there."""

    data: str = option("unread", "Run", "Not read by a plan.", "dataset_name")
    output: str = option("unwritten", "Run", "Not written by a plan.", "output_dir", free=True)


@app.command()
@with_flags(PlanOptions, without=("model", "data", "output"))
def plan(
    model: Annotated[
        str,
        typer.Argument(help="Directory, config.json or hub id of the model; or the YAML file of a run."),
    ],
    config: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG.yaml]", help="Options by name, one per line; flags override them."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="24GB of memory, or 1% of the parameters: propose rank, targets, quantisation and batch.",
            rich_help_panel="Memory",
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            help="Device to train on: cpu or cuda; auto takes what is there.", rich_help_panel="Memory"
        ),
    ] = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the plan as JSON.", rich_help_panel="Output")
    ] = False,
    **given: Any,
) -> None:
    """Show what would be adapted, and what memory and compute training takes, from the configuration alone.

    No weights are read. Takes the flags and the YAML file of veneer train.
    """
    if device not in DEVICES:
        raise ConfigError(f"device is one of {', '.join(DEVICES)}, not {device!r}")
    if model.endswith((".yaml", ".yml")) and config is None:
        config = Path(model)
    elif model:
        given = {**given, "model": model}
    limit = None if budget is None else parse_budget(budget)
    options = options_of(PlanOptions, config, given)
    usual = {part.name: part.default for part in dataclasses.fields(PlanOptions)}
    fixed = {
        settled
        for name, settled in CHANGEABLE.items()
        if given.get(name) is not None or getattr(options, name) != usual[name]
    }
    if options.resume_from_adapter:
        fixed |= {"r", "target_modules"}
    check_model(options.model, config_file=True)
    load_libraries("torch", "transformers")
    from ..training.loading import training_device
    from ..training.planning import Step, plan_training

    if device == "auto":
        place = training_device()
        device = "cuda" if place is not None and place.type == "cuda" else "cpu"
    step = Step.of(options, device=device)
    with Terminal().waiting("Planning"):
        found = plan_training(
            options.model, adapter_config(options), step, budget=limit, fixed=fixed, dtype=options.dtype
        )
    if as_json:
        show_json(found.to_dict())
    else:
        _show(found)


def _show(found: PlanReport) -> None:
    from ..training.console import PlainConsole

    console, said = PlainConsole(), found.estimate
    console.print(
        f"{found.model}: {found.architecture}, {said.parameters - said.trainable:,} parameters "
        f"in {found.dtype}",
        soft_wrap=True,
    )
    console.print()
    _targets(console, found)
    console.print()
    _needs(console, found)
    if found.proposal is not None:
        console.print()
        _proposal(console, found, found.proposal.given_up)


def _targets(console: Console, found: PlanReport) -> None:
    from rich.table import Table

    from ..training.planning.report import layer_numbers

    specs = {spec.path: spec for spec in found.plan.specs}
    table = Table()
    for column in ("pattern", "modules", "layers", "r", "scaling", "for example"):
        table.add_column(column, justify="right" if column in ("modules", "r", "scaling") else "left")
    for pattern, paths in found.plan.matched.items():
        kinds = by_kind(paths)
        for place, (name, inside) in enumerate(kinds.items() or [("", [])]):
            ranks = sorted({specs[path].r for path in inside})
            scales = sorted({specs[path].scaling for path in inside})
            table.add_row(
                pattern if not place else "",
                str(len(inside)),
                ranges(layer_numbers(inside)),
                ranges(ranks),
                ", ".join(f"{scale:.3g}" for scale in scales),
                name if len(kinds) > 1 else inside[0] if inside else "",
            )
    console.print(table)
    if found.plan.modules_to_save:
        console.print(f"trained in full: {', '.join(found.plan.modules_to_save)}")
    for entry in found.plan.unmatched:
        console.print("warning: " + in_flags(entry.message, flags_of("plan")), soft_wrap=True)
    reasons: dict[str, list[str]] = {}
    for skipped in found.plan.skipped:
        reasons.setdefault(skipped.reason, []).append(skipped.path)
    for reason, left in reasons.items():
        console.print(f"left out ({reason}): {listed(left)}", soft_wrap=True)
    if found.left_out:
        rest = Table()
        for column in ("not adapted", "type", "number", "parameters"):
            rest.add_column(column, justify="right" if column in ("number", "parameters") else "left")
        for group in found.left_out:
            rest.add_row(group.name, group.type_name, str(group.number), f"{group.parameters:,}")
        console.print(rest)


def _needs(console: Console, found: PlanReport) -> None:
    from rich.table import Table

    said, step = found.estimate, found.step
    share = said.trainable / max(1, said.parameters)
    console.print(f"trainable    {said.trainable:,} parameters ({share:.3%})")
    console.print(f"adapter      {size(said.adapter_bytes)} when saved")
    console.print(
        f"arithmetic   {_flops(said.flops_per_token)} a token, {_flops(said.flops)} a batch, "
        "forward and backward"
    )
    words = [f"{step.batch_size} x {step.sequence_length} tokens", step.optim]
    words += [f"base in {step.quantize}"] * bool(step.quantize)
    words += ["gradient checkpointing"] * step.gradient_checkpointing
    words += [f"loss in chunks of {step.loss_chunk_size}"] * bool(step.loss_chunk_size)
    table = Table(title=f"Memory of a step: {', '.join(words)}", title_justify="left", title_style="")
    parts = ("base", "factors", "gradients", "optimizer", "activations", "logits", "peak")
    for part in parts:
        table.add_column(part, justify="right")
    table.add_row(*(size(getattr(said, part)) for part in parts))
    console.print()
    console.print(table)
    total = sum(getattr(said, part) for part in parts[:-1])
    if said.peak < total and size(said.peak) != size(total):
        console.print("The peak is less than the sum: gradients come while activations go.")
    for note in said.notes:
        console.print(f"note: {note}", soft_wrap=True)


def _proposal(console: Console, found: PlanReport, given_up: tuple[str, ...]) -> None:
    console.print(
        f"Keeps to the budget: {'; '.join(given_up)}" if given_up else "Keeps to the budget as it is.",
        soft_wrap=True,
    )
    targets, bare, step = found.config.target_modules, found.config.target_parameters, found.step
    chosen: dict[str, Any] = {
        "lora_r": found.config.r,
        "lora_alpha": f"{found.config.lora_alpha:g}",
        "lora_target_modules": targets if isinstance(targets, str) else ",".join(sorted(targets or ())),
        "lora_target_parameters": ",".join(bare or ()),
        "batch_size": step.batch_size,
        "gradient_accumulation_steps": step.gradient_accumulation_steps,
        "quantize": step.quantize,
        "gradient_checkpointing": step.gradient_checkpointing,
        "loss_chunk_size": step.loss_chunk_size,
        "max_length": step.sequence_length,
    }
    words = ["veneer", "train", "--model", found.model]
    for name, value in chosen.items():
        if value:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    console.print(f"To train: {shlex.join(words)}", soft_wrap=True)


def _flops(count: int) -> str:
    for unit, factor in (("PFLOP", 10**15), ("TFLOP", 10**12), ("GFLOP", 10**9), ("MFLOP", 10**6)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count} FLOP"
