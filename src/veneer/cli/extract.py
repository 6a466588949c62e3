"""``veneer extract``: an adapter from a model that was trained whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..tools.requests import check_place, check_size
from ..training.paths import all_of, check_model
from ..training.progress import Terminal
from ..wording import listed, size
from .asking import AsJson, Energy, ListModules, NewAdapter, Overwrite
from .common import app, load_libraries, show, show_errors, show_report, show_written

if TYPE_CHECKING:
    from ..tools import ExtractReport


@app.command()
def extract(
    base: Annotated[str, typer.Option(help="Directory or hub id of the base model.")],
    tuned: Annotated[str, typer.Option(help="Directory or hub id of what training made of it.")],
    output: NewAdapter,
    rank: Annotated[int | None, typer.Option(help="Largest rank of a module.")] = None,
    energy: Energy = None,
    dtype: Annotated[
        str, typer.Option(help="Type of the new adapter: float32, bfloat16 or float16.")
    ] = "float32",
    factors_only: Annotated[
        bool,
        typer.Option(
            "--factors-only",
            help="Leave out norms and biases, which programs that serve adapters do not read.",
        ),
    ] = False,
    modules: ListModules = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Make an adapter of a model that was trained whole, and say what it misses.

    Reads the safetensors files of both models, one tensor at a time, and makes no model. Of each weight that
    differs, and of each expert, the adapter gets the nearest update of the rank; norms and biases are saved
    whole. What an adapter cannot hold is listed.
    """
    check_size(rank, energy)
    all_of([lambda: check_model(base), lambda: check_model(tuned)])
    check_place(output, [Path(base), Path(tuned)], overwrite, "model")
    load_libraries("torch", "transformers")
    from ..tools import extract_adapter

    progress = Terminal()
    report = extract_adapter(
        base,
        tuned,
        output,
        rank=rank,
        energy=energy,
        dtype=dtype,
        whole=not factors_only,
        overwrite=overwrite,
        progress=progress,
    )
    if as_json:
        show_report(report)
        return
    found = {path.removesuffix(".weight"): module for path, module in report.modules.items()}
    ranks, errors = {p: m.rank for p, m in found.items()}, {p: m.error for p, m in found.items()}
    show_errors(ranks, errors, modules)
    _show_others(report, modules)
    show(str(report))
    show_written(output)


def _show_others(report: ExtractReport, every: bool) -> None:
    """What is no factor; the names of all that is left out only with ``every``, as for modules."""
    most = len(report.left_out) if every else 3
    if report.whole:
        show(f"saved whole: {len(report.whole)} tensors, {size(sum(report.whole.values()))}")
    for reason in dict.fromkeys(tensor.reason for tensor in report.left_out.values()):
        found = {name: tensor.size for name, tensor in report.left_out.items() if tensor.reason == reason}
        names = listed([f"{name} ({size(count)})" for name, count in found.items()], most)
        show(f"left out, {size(sum(found.values()))}: {names}: {reason}")
    for note in report.notes:
        show(f"note: {note}")
