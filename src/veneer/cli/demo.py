"""``veneer demo``: watch a real language model learn a real task, and check every claim."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import DONE, FAILED, app, show, show_json, size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..training.demo import DemoResult


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Directory for adapter, merged model and metrics.")] = Path(
        "veneer-demo"
    ),
    seed: Annotated[int, typer.Option(help="Of the start of the factors and the order of the mails.")] = 0,
    export: Annotated[
        Path | None,
        typer.Option(help="Only write the model and the mails (JSONL) into this directory, to work with."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the metrics as JSON instead of tables.")
    ] = False,
) -> int:
    """Teach SmolLM2-135M to turn mail headers into JSON: before, after, reloaded, merged.

    Downloads the model (93 to 272 MB, once), then takes some minutes on two cores. Exits 1 unless the model
    learned the task and the reloaded and the merged model agree with the trained one.
    """
    import json

    from ..training import Terminal
    from ..training.demo import export_demo, run_demo

    if export is not None:
        made = export_demo(export, Terminal())
        if as_json:
            show_json({name: str(place) for name, place in made.items()})
        else:
            for name, place in made.items():
                show(f"{name:<8} {place}")
        return DONE
    result = run_demo(output, seed, Terminal())
    if as_json:
        show_json(json.loads((output / "metrics.json").read_text(encoding="utf-8")))
    else:
        _show(result)
    return DONE if result.passed else FAILED


def _show(result: DemoResult) -> None:
    from ..training.console import PlainConsole

    console = PlainConsole()
    console.print()
    for place in _telling(result):
        _side_by_side(console, result, place)
    console.print(f"{len(result.mails)} held-out mails, whose senders and threads it was not trained on:")
    console.print(_scores(result))
    console.print()
    console.print("What had to be reached:")
    console.print(_bars(result))
    share = result.trainable / result.parameters
    adapter, base = result.sizes["adapter"], result.sizes["base"]
    console.print(
        f"Trained {result.trainable:,} of {result.parameters:,} parameters ({share:.2%}). "
        f"The adapter has {size(adapter)}, the base {size(base)}: {base / adapter:.0f} times as much.",
        soft_wrap=True,
    )
    console.print(
        f"Merged into 32-bit weights ({size(result.sizes['merged'])}), which round the last place only; "
        f"16-bit weights would have kept {result.kept_in_16_bits:.1%} of the update.",
        soft_wrap=True,
    )
    console.print(
        f"It took {sum(result.seconds.values()):.0f} s, {result.seconds['training']:.0f} of them training."
    )
    console.print()
    for name, place_of in result.places.items():
        console.print(f"  {name:<13} {place_of}", soft_wrap=True)
    console.print()
    console.print(f"Try: veneer inspect {result.places['adapter']}", soft_wrap=True)
    failed = [bar.what for bar in result.bars if not bar.passed]
    console.print()
    console.print(f"NOT REACHED: {', '.join(failed)}" if failed else "Every bar was reached.", style="bold")


def _telling(result: DemoResult) -> list[int]:
    """Places of two short mails that were learned, and of one that was not."""
    from ..training import exact_match

    right = [
        exact_match(a, mail["answer"]) for a, mail in zip(result.after.answers, result.mails, strict=True)
    ]
    places = sorted(range(len(right)), key=lambda place: len(result.mails[place]["header"]))
    return [p for p in places if right[p]][:2] + [p for p in places if not right[p]][:1]


def _side_by_side(console: Console, result: DemoResult, place: int) -> None:
    from rich.table import Table

    from ..training import exact_match
    from ..training.console import paragraphs

    mail = result.mails[place]
    table = Table(title=paragraphs(mail["header"]), title_justify="left", title_style="", expand=True)
    exact = "right" if exact_match(result.after.answers[place], mail["answer"]) else "wrong"
    table.add_column("before", ratio=1)
    table.add_column(f"after ({exact})", ratio=1)
    before = result.before.answers[place].strip()
    after = result.after.answers[place].strip()
    table.add_row(paragraphs(before[:200] + " …" * (len(before) > 200)), paragraphs(after))
    console.print(table)
    console.print()


def _scores(result: DemoResult) -> Table:
    from rich.table import Table

    total = len(result.mails)
    table = Table()
    for column in ("", "before", "after", "reloaded"):
        table.add_column(column, justify="left" if not column else "right")
    scores = (result.before, result.after, result.reloaded)
    table.add_row("exact match", *(f"{score.exact}/{total}" for score in scores))
    table.add_row("valid JSON", *(f"{score.valid}/{total}" for score in scores))
    table.add_row("held-out loss", *(f"{score.loss:.3f}" for score in scores))
    return table


def _bars(result: DemoResult) -> Table:
    from rich.table import Table

    table = Table()
    for column in ("", "needed", "reached", ""):
        table.add_column(column)
    for bar in result.bars:
        table.add_row(bar.what, bar.needed, bar.reached, "yes" if bar.passed else "NO")
    return table
