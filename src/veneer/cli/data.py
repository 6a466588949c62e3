"""``veneer data``: what a run would train on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..training.data.sources import check_source, read_records
from ..training.options import RunOptions, option
from ..training.paths import all_of, check_model
from .asking import AsJson
from .common import app, console, load_libraries, show, show_json
from .fields import options_of, with_flags


@dataclass(frozen=True)
class DataOptions(RunOptions):
    """The options of a run that writes nothing."""

    output: str = option("unwritten", "Run", "Not written.", "output_dir", free=True)


@app.command()
@with_flags(DataOptions, only=("model", "columns", "max_length", "method", "task"))
def data(
    source: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="File, directory or hub id, as for train; or the YAML file of a run, which names it.",
        ),
    ],
    rows: Annotated[
        int, typer.Option(min=0, help="How many examples to show.", rich_help_panel="Output")
    ] = 3,
    as_json: AsJson = False,
    **given: Any,
) -> None:
    """Show what a run would train on: examples with their loss, lengths, what is cut, duplicates.

    The examples are encoded as in training. Of the model, only the tokenizer is loaded.
    """
    config = Path(source) if source.endswith((".yaml", ".yml")) else None
    options = options_of(DataOptions, config, given if config else {**given, "data": source})
    all_of([partial(check_source, options.data), partial(check_model, options.model)])
    records = read_records(options.data, options.purpose, options.column_names())
    load_libraries("torch", "transformers")
    from ..training.data.report import legend, report, written
    from ..training.models import load_tokenizer

    found = report(records, load_tokenizer(options.model), options.max_length, options.method, rows)
    if as_json:
        show_json(found.as_json())
        return
    terminal = console()
    in_colour = terminal.color_system is not None and not terminal.no_color
    for line in (records.line(), *found.encoded.lines(), "", *([legend(in_colour)] if found.shown else [])):
        show(line)
    for number, example in enumerate(found.shown, start=1):
        show(f"example {number}:")
        terminal.print(written(example, in_colour), soft_wrap=True)
        show()
    for line in found.lines():
        show(line)
