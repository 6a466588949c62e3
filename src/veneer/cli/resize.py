"""``veneer resize``: an adapter of a smaller rank, and what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..tools.requests import check_place, check_size
from ..training.progress import Terminal
from ..training.saved_adapter import read_adapter
from ..wording import size
from .asking import AsJson
from .common import app, console, load_libraries, show, show_json, table

if TYPE_CHECKING:
    from ..tools import ResizeReport


@app.command()
def resize(
    adapter: Annotated[str, typer.Argument(help="Directory or hub id of the adapter.")],
    output: Annotated[Path, typer.Option(help="Directory for the new adapter; a failure writes nothing.")],
    rank: Annotated[
        int | None, typer.Option(help="Largest rank of a module; smaller ones stay as they are.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Give each module the smallest rank that keeps this share of its update, as 0.99."),
    ] = None,
    modules: Annotated[
        bool, typer.Option("--modules", help="List every module, not only the kinds of modules.")
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite-output-dir", help="Replace the adapter in a directory that is not empty."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Give an adapter a smaller rank: the nearest updates of that rank, and the error of each module.

    Reads the adapter's files and loads no model. The strength of each module stays, so alpha follows the
    rank. The energy of an update is the sum of its squared singular values; the error is the norm of what is
    missed, as a share of the norm of the update.
    """
    check_size(rank, energy)
    progress = Terminal()
    saved = read_adapter(adapter, progress)
    check_place(output, [saved.directory], overwrite)
    load_libraries("torch")
    from ..tools import resize_adapter

    with progress.waiting(f"Resizing {saved.name}"):
        report = resize_adapter(saved.directory, output, rank=rank, energy=energy, overwrite=overwrite)
    if as_json:
        show_json(_plain(report))
        return
    _show(report, modules)
    (weights,) = output.glob("adapter_model.safetensors")
    show(f"adapter ({size(weights.stat().st_size)}): {output}")


def _plain(report: ResizeReport) -> dict[str, object]:
    modules = {
        path: {"rank_before": m.before, "rank": m.after, "error": m.error}
        for path, m in report.modules.items()
    }
    return {
        "output": str(report.directory),
        "norm": report.norm,
        "error": report.error,
        "modules": modules,
        "notes": list(report.notes),
    }


def _show(report: ResizeReport, every: bool) -> None:
    kinds: dict[str, list[str]] = {}
    for path in report.modules:
        kinds.setdefault(path if every else path.rpartition(".")[2], []).append(path)
    shown = table("module", "count", "rank before", "rank", "error", "most")
    for kind, paths in kinds.items():
        found = [report.modules[path] for path in paths]
        errors = [module.error for module in found]
        shown.add_row(
            kind,
            str(len(found)),
            _span([module.before for module in found]),
            _span([module.after for module in found]),
            f"{sum(errors) / len(errors):.2%}",
            f"{max(errors):.2%}",
        )
    console().print(shown)
    show()
    for note in report.notes:
        show(f"note: {note}")
    show(str(report))


def _span(ranks: list[int]) -> str:
    return str(min(ranks)) if min(ranks) == max(ranks) else f"{min(ranks)}–{max(ranks)}"
