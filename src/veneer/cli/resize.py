"""``veneer resize``: an adapter of a smaller rank, and what that costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..tools.requests import check_place, check_size
from ..training.progress import Terminal
from ..training.saved_adapter import read_adapter
from ..wording import span
from .asking import Adapter, AsJson, Energy, ListModules, NewAdapter, Overwrite
from .common import app, by_kind, console, load_libraries, show, show_report, show_written, table

if TYPE_CHECKING:
    from ..tools import ResizeReport


@app.command()
def resize(
    adapter: Adapter,
    output: NewAdapter,
    rank: Annotated[
        int | None, typer.Option(help="Largest rank of a module; smaller ones stay as they are.")
    ] = None,
    energy: Energy = None,
    modules: ListModules = False,
    overwrite: Overwrite = False,
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
        show_report(report)
        return
    _show(report, modules)
    show_written(output)


def _show(report: ResizeReport, every: bool) -> None:
    shown = table("module", "count", "rank before", "rank", "error", "most")
    for kind, paths in by_kind(report.modules, every).items():
        found = [report.modules[path] for path in paths]
        errors = [module.error for module in found]
        shown.add_row(
            kind,
            str(len(found)),
            span([module.before for module in found]),
            span([module.after for module in found]),
            f"{sum(errors) / len(errors):.2%}",
            f"{max(errors):.2%}",
        )
    console().print(shown)
    show()
    for note in report.notes:
        show(f"note: {note}")
    show(str(report))
