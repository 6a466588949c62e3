"""``veneer combine``: one adapter that is the weighted sum of several."""

from __future__ import annotations

from typing import Annotated

import typer

from ..tools.requests import METHODS, Request, check_place
from ..training.progress import Terminal
from ..training.saved_adapter import read_adapter
from .asking import AsJson, NewAdapter, Overwrite
from .common import app, load_libraries, show, show_errors, show_json, show_written


@app.command()
def combine(
    adapters: Annotated[list[str], typer.Argument(help="Directories or hub ids of adapters of one base.")],
    output: NewAdapter,
    weights: Annotated[
        str | None, typer.Option(help="A number for each adapter, as 0.7,0.3 or 1,-1; by default 1.")
    ] = None,
    combination_type: Annotated[
        str,
        typer.Option(
            "--method",
            help=f"{', '.join(METHODS)}. The last four combine the entries of the updates, the four before "
            "them those of the factors.",
        ),
    ] = "cat",
    rank: Annotated[int | None, typer.Option(help="Largest rank of a module of the result.")] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Give each module the smallest rank that keeps this share of the sum, as 0.99."),
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of the entries that ties, dare and magnitude_prune keep.")
    ] = None,
    majority_sign_method: Annotated[
        str, typer.Option(help="How ties and dare_ties vote: total or frequency.")
    ] = "total",
    seed: Annotated[int, typer.Option(help="Seed for the entries that dare drops.")] = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Add up adapters of one base: the result's update is the weighted sum of theirs.

    Reads the adapters' files and loads no model. The sum is exact, with the rank of all of them together,
    unless a rank is asked for or a method that trims; the error of each module is then said.
    """
    numbers = None if weights is None else _numbers(weights)
    Request.of(len(adapters), numbers, combination_type, rank, energy, density, majority_sign_method)
    progress = Terminal()
    places = [read_adapter(name, progress).directory for name in adapters]
    check_place(output, places, overwrite)
    load_libraries("torch")
    import torch

    from ..tools import combine_adapters

    torch.manual_seed(seed)
    with progress.waiting("Combining"):
        report = combine_adapters(
            places,
            output,
            numbers,
            combination_type=combination_type,
            rank=rank,
            energy=energy,
            density=density,
            majority_sign_method=majority_sign_method,
            overwrite=overwrite,
        )
    if as_json:
        modules = {path: {"rank": r, "error": report.errors[path]} for path, r in report.ranks.items()}
        found = {"output": str(output), "method": report.combination_type, "worst_error": report.worst}
        show_json({**found, "modules": modules})
        return
    show_errors(report.ranks, report.errors)
    show(str(report))
    show_written(output)


def _numbers(weights: str) -> list[float]:
    try:
        return [float(word) for word in weights.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"--weights takes numbers with commas between them, not {weights!r}"
        ) from None
