"""``veneer eval``: measure adapters and their base, or a plain model, on data."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, Hint, VeneerError
from ..training.comparable import check_comparable, check_same_tokens
from ..training.data.columns import parse_columns
from ..training.data.sources import check_source, read_records
from ..training.loading import Loading
from ..training.paths import all_of, check_model
from ..training.progress import Terminal
from ..training.saved_adapter import PlainModel, SavedAdapter, base_name, read_adapter, read_adapter_or_model
from .asking import AsJson, Model, in_flags
from .common import app, console, load_libraries, show_json

if TYPE_CHECKING:
    from ..training.data import Records
    from ..training.scores import Comparison


@app.command("eval")
@in_flags
def evaluate(
    adapter: Annotated[
        list[str],
        typer.Argument(
            help="Directory or hub id of an adapter, or of a merged or plain model; several adapters of one "
            "base are measured together."
        ),
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
        int, typer.Option(min=1, help="Maximum length of an example, in tokens; longer ones are cut.")
    ] = 1024,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "--per-device-eval-batch-size", min=1, help="Examples in a batch.")
    ] = 8,
    max_samples: Annotated[
        int | None, typer.Option(min=1, help="Measure only the first examples, this many.")
    ] = None,
    exact_match: Annotated[
        bool, typer.Option(help="Also generate the answers, and count those that are as expected.")
    ] = True,
    loading: Loading = Loading(quantize="auto"),
    as_json: AsJson = False,
) -> None:
    """Measure loss, perplexity and exact match of adapters and their base, or of a merged or plain model.

    Several adapters of one base answer in mixed batches, and the base is read once. A classifier's accuracy
    is measured beside guessing.
    """
    renamed = None if columns is None else parse_columns(columns)
    progress = Terminal()
    sources = _sources(adapter, data, model, loading.quantize, progress)
    first = sources[0]
    names = first.classes() if isinstance(first, SavedAdapter) else first.classes
    if names is not None and len(names) == 1:
        raise VeneerError(
            f"{first.name} is a reward model, which names no classes; veneer train --method reward measures "
            "it on the pairs of its --eval-data"
        )
    with progress.waiting("Reading the data"):
        records = read_records(data, "sft" if names is None else "classification", renamed)
    progress.say(records.line())
    if max_samples is not None and max_samples < len(records):
        records = records.first(max_samples)
        progress.say(f"Measuring the first {max_samples} of them")
    load_libraries("torch", "transformers")
    from ..training.scores import accuracy, compare

    adapters = [source for source in sources if isinstance(source, SavedAdapter)]
    if len(adapters) > 1:
        base = base_name(adapters[0], model)
        check_same_tokens(adapters, lambda saved: _rows(saved, base, records, max_length))
    loaded, tokenizer, labels = _loaded(sources, model, loading, progress)
    common: dict[str, Any] = {
        "max_length": max_length, "batch_size": batch_size, "labels": labels, "progress": progress
    }  # fmt: skip
    if names is None:
        found = compare(loaded, tokenizer, records, exact_match=exact_match, **common)
    else:
        found = accuracy(loaded, tokenizer, records, names, **common)
    for line in found.notes:
        progress.say(line)
    if as_json:
        kind = "adapter" if isinstance(first, SavedAdapter) else "model"
        named = {} if labels else {f"{kind}_path": first.name}
        show_json({**named, "data": data, **found.as_json()})
    else:
        _table(found)


def _sources(
    named: list[str], data: str, model: str | None, quantize: str, progress: Terminal
) -> list[SavedAdapter] | list[PlainModel]:
    """What is to be measured: one model, or adapters that can be measured together."""

    def read_plain(name: str | os.PathLike[str]) -> PlainModel:
        check_source(data)
        load_libraries("torch", "transformers")
        from ..training import models

        return models.read_plain(name)

    if len(named) == 1:
        source = read_adapter_or_model(named[0], read_plain, progress)
        if isinstance(source, PlainModel):
            if model is not None:
                raise ConfigError(
                    Hint("model"), f" names an adapter's base, but {source.name} is a whole model"
                )
            progress.say(f"{source.name} is a whole model: it is measured by itself")
            return [source]
        check_model(base_name(source, model))
        beside = "" if source.classes() else ": it is measured beside its base"
        progress.say(f"{source.name} is an adapter{beside}")
        return [source]
    adapters: list[SavedAdapter] = []

    def read(name: str) -> None:
        adapters.append(read_adapter(name, progress))

    all_of([*(partial(read, name) for name in named), partial(check_source, data)])
    check_comparable(adapters, model, quantize)
    check_model(base_name(adapters[0], model))
    progress.say(f"{len(adapters)} adapters of one base are measured together")
    return adapters


def _rows(saved: SavedAdapter, base: str, records: Records, max_length: int) -> list[Any]:
    """The data as the tokenizer of an adapter lays it out."""
    from ..training.adapters import own_tokenizer
    from ..training.data import encode, encode_classification
    from ..training.models import load_tokenizer

    tokenizer, names = own_tokenizer(saved.directory) or load_tokenizer(base), saved.classes()
    if names is None:
        return list(encode(records, tokenizer, max_length).rows)
    return list(encode_classification(records, tokenizer, max_length, names).rows)


def _loaded(
    sources: list[SavedAdapter] | list[PlainModel], model: str | None, loading: Loading, progress: Terminal
) -> tuple[Any, Any, dict[str, str] | None]:
    """(model, tokenizer, by its name in the model what each of several adapters is called)."""
    from ..checks import check_adapters_act
    from ..training.adapters import load_adapted, load_plain

    first, *rest = sources
    if isinstance(first, PlainModel):
        return *load_plain(first, loading, progress), None
    others = {str(number): other for number, other in enumerate(rest, 2) if isinstance(other, SavedAdapter)}
    loaded, tokenizer = load_adapted(first, model, loading, others, progress)
    labels = {"default": first.name} | {name: other.name for name, other in others.items()}
    check_adapters_act(loaded, labels)
    return loaded, tokenizer, labels if rest else None


def _table(found: Comparison) -> None:
    from rich.table import Table

    table = Table()
    head, *rows = found.table()
    for number, column in enumerate(head):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console().print(table)
