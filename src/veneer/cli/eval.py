"""``veneer eval``: measure an adapter and its base, or a plain model, on data."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, Hint, VeneerError
from ..training.data.columns import parse_columns
from ..training.data.sources import check_source, read_records
from ..training.loading import Loading
from ..training.paths import check_model
from ..training.progress import Terminal
from ..training.saved_adapter import PlainModel, SavedAdapter, base_name, read_adapter_or_model
from .asking import AsJson, Attention, Device, Dtype, Model, Quantize
from .common import app, load_libraries, show_json

if TYPE_CHECKING:
    from ..training.scores import Comparison


@app.command("eval")
def evaluate(
    adapter: Annotated[
        str, typer.Argument(help="Directory or hub id of an adapter, or of a merged or plain model.")
    ],
    data: Annotated[
        str,
        typer.Option(help="Held-out examples: file, directory or hub id, with the columns that train takes."),
    ],
    model: Model = None,
    columns: Annotated[
        str | None,
        typer.Option(help="Columns that have other names in the data: prompt=question,completion=answer."),
    ] = None,
    max_length: Annotated[
        int, typer.Option(help="Maximum length of an example, in tokens; longer ones are cut.")
    ] = 1024,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "--per-device-eval-batch-size", help="Examples in a batch.")
    ] = 8,
    max_samples: Annotated[
        int | None, typer.Option(help="Measure only the first examples, this many.")
    ] = None,
    exact_match: Annotated[
        bool, typer.Option(help="Also generate the answers, and count those that are as expected.")
    ] = True,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantize: Quantize = "auto",
    attn_implementation: Attention = None,
    as_json: AsJson = False,
) -> None:
    """Measure loss, perplexity and exact match of an adapter and its base, or of a merged or plain model.

    A classifier's accuracy is measured beside guessing.
    """
    loading = Loading(dtype, device, quantize, attn_implementation)
    for name, value in (
        ("--max-length", max_length),
        ("--batch-size", batch_size),
        ("--max-samples", max_samples),
    ):
        if value is not None and value < 1:
            raise typer.BadParameter(f"{name} must be above 0, not {value}")
    renamed = None if columns is None else parse_columns(columns)
    progress = Terminal()

    def read_plain(name: str | os.PathLike[str]) -> PlainModel:
        check_source(data)
        load_libraries("torch", "transformers")
        from ..training import models

        return models.read_plain(name)

    source = read_adapter_or_model(adapter, read_plain, progress)
    if isinstance(source, SavedAdapter):
        names, kind = source.classes(), "adapter"
        check_model(base_name(source, model))
        progress.say(
            f"{adapter} is an adapter" + (": it is measured beside its base" if names is None else "")
        )
    else:
        names, kind = source.classes, "model"
        if model is not None:
            raise ConfigError(Hint("model"), f" names an adapter's base, but {adapter} is a whole model")
        progress.say(f"{adapter} is a whole model: it is measured by itself")
    if names is not None and len(names) == 1:
        raise VeneerError(
            f"{adapter} is a reward model, which names no classes; veneer train --method reward measures it "
            "on the pairs of its --eval-data"
        )
    with progress.waiting("Reading the data"):
        records = read_records(data, "sft" if names is None else "classification", renamed)
    progress.say(records.line())
    if max_samples is not None and max_samples < len(records):
        records = records.first(max_samples)
        progress.say(f"Measuring the first {max_samples} of them")
    load_libraries("torch", "transformers")
    from ..training.adapters import load_adapted, load_plain
    from ..training.scores import accuracy, compare

    if isinstance(source, SavedAdapter):
        loaded, tokenizer = load_adapted(source, model, loading, progress=progress)
    else:
        loaded, tokenizer = load_plain(source, loading, progress)
    common: dict[str, Any] = {"max_length": max_length, "batch_size": batch_size, "progress": progress}
    if names is None:
        found = compare(loaded, tokenizer, records, exact_match=exact_match, **common)
    else:
        found = accuracy(loaded, tokenizer, records, names, **common)
    for line in found.notes:
        progress.say(line)
    if as_json:
        show_json({f"{kind}_path": adapter, "data": data, **found.as_json()})
    else:
        _table(found)


def _table(found: Comparison) -> None:
    from rich.table import Table

    from ..training.console import PlainConsole

    table = Table()
    head, *rows = found.table()
    for number, column in enumerate(head):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    PlainConsole().print(table)
