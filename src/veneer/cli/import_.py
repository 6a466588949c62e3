"""``veneer import``: an adapter of another program in PEFT's format."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from ..files.overwrite import check_replaceable
from ..integrations.imports.locating import check_source, in_a_layout
from ..tools.requests import check_place
from .asking import Overwrite
from .common import app, load_libraries, show, show_json
from .convert import show_converted


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="The file, or the directory that contains it.")],
    output: Annotated[Path, typer.Argument(help="Directory for the adapter; a failure writes nothing.")],
    base: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Base model for the adapter to name. A directory of a model or pipeline also helps to "
            "resolve flattened names, and tells how experts are stored.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Convert an adapter of diffusers, kohya's sd-scripts or Tinker to PEFT's format.

    Every tensor is accounted for: if some cannot be read, they are listed and nothing is written. An adapter
    for several parts of a pipeline becomes one directory for each part. Of an adapter whose experts are in
    another layout than PEFT's, and of Tinker's archive (.tar), the layout is told as by `veneer convert`.
    """
    if in_a_layout(source):
        _import_layout(source, output, base, overwrite, as_json)
        return
    check_source(source)
    check_replaceable(output, overwrite, "adapter")
    load_libraries("torch")
    from ..integrations.imports import import_adapter

    place = None if base is None else Path(base).expanduser()
    report = import_adapter(
        source,
        output,
        base=place if place is not None and place.is_dir() else None,
        base_model_name_or_path=base,
        overwrite=overwrite,
    )
    if as_json:
        show_json(
            {
                "source": str(report.source),
                "spelling": report.spelling,
                "adapters": {
                    name: {"output": str(place), "ranks": dict(report.modules[name])}
                    for name, place in report.directories.items()
                },
            }
        )
        return
    show(f"{report.source} (as {report.spelling} writes them)")
    for name, place in report.directories.items():
        ranks = Counter(report.modules[name].values())
        words = ", ".join(f"{count} of rank {r}" for r, count in sorted(ranks.items()))
        show(f"{name}: {sum(ranks.values())} modules ({words}): {place}")


def _import_layout(source: Path, output: Path, base: str | None, overwrite: bool, as_json: bool) -> None:
    """Import an adapter of PEFT's names whose experts may be in any layout, or Tinker's archive of one."""
    check_place(output, [source], overwrite)
    load_libraries("torch")
    from ..tools import convert_adapter

    report = convert_adapter(source, output, layout="peft", base=base, overwrite=overwrite)
    show_converted(report, as_json)
