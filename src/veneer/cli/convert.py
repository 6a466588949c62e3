"""``veneer convert``: an adapter written in another way, with the updates that it has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..expert_layouts.layouts import LAYOUTS, known
from ..tools.requests import check_place
from ..training.progress import Terminal
from ..training.saved_adapter import read_adapter
from .asking import Adapter, AsJson, Overwrite
from .common import app, load_libraries, show, show_report, show_written
from .plain_lora import make_plain

if TYPE_CHECKING:
    from ..tools import ConvertReport


@app.command()
def convert(
    adapter: Adapter,
    output: Annotated[Path, typer.Argument(help="Directory for the adapter; a failure writes nothing.")],
    layout: Annotated[
        str | None, typer.Option(help=f"Layout of the experts to write: {', '.join(LAYOUTS)}.")
    ] = None,
    from_layout: Annotated[
        str | None, typer.Option(help="Layout of the experts in the file, where it cannot be told.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Directory of the base model: its config.json tells how its experts are stored, and --plain "
            "of a DoRA reads its weights.",
        ),
    ] = None,
    plain: Annotated[
        bool,
        typer.Option(
            "--plain",
            help="Write plain LoRA: a DoRA as the nearest updates of --rank, options folded.",
        ),
    ] = False,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank for --plain of a DoRA.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter as safetensors, with the experts of a mixture in another layout, or as plain LoRA.

    Programs write the factors of experts in several layouts, some of which differ in nothing but their order.
    The update of every expert stays what it was. What a layout has no place for is refused, with a list of
    everything in the way. Plain LoRA of a DoRA is an approximation, whose error is said for each module, as
    a share of its update and of its output.
    """
    if plain and (layout or from_layout):
        raise typer.BadParameter("--plain and a layout of experts are two conversions: make one of the other")
    if rank is not None and not plain:
        raise typer.BadParameter("--rank is for --plain")
    for name in (layout, from_layout):
        if name is not None:
            known(name)
    progress = Terminal()
    saved = read_adapter(adapter, progress)
    check_place(output, [saved.directory], overwrite)
    if plain:
        make_plain(saved, output, base, rank, overwrite, as_json)
        return
    load_libraries("torch")
    from ..tools import convert_adapter

    with progress.waiting(f"Converting {saved.name}"):
        report = convert_adapter(
            saved.directory,
            output,
            layout=layout,
            from_layout=from_layout,
            base=base,
            overwrite=overwrite,
        )
    show_converted(report, as_json)


def show_converted(report: ConvertReport, as_json: bool) -> None:
    """Say what was read and written."""
    if as_json:
        experts = {p: {"count": count, "projections": parts} for p, (count, parts) in report.experts.items()}
        tensors = dict(zip(("read", "written"), report.tensors, strict=True))
        show_report(report, experts=experts, tensors=tensors)
        return
    _show(report)
    show_written(report.directory)


def _show(report: ConvertReport) -> None:
    if report.found is None:
        show("no experts")
    else:
        counts = sorted({count for count, _ in report.experts.values()})
        show(f"found: {report.found} ({report.why})")
        show(f"written: {report.layout} ({LAYOUTS[report.layout or report.found].program})")
        if counts:
            show(f"experts: {', '.join(map(str, counts))} in each of {len(report.experts)} layers")
    for note in report.notes:
        show(f"note: {note}")
    show(f"tensors: {report.tensors[0]} read, {report.tensors[1]} written")
