"""``veneer import``: an adapter of diffusers or kohya's sd-scripts in PEFT's format."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from ..files.overwrite import check_replaceable
from ..integrations.imports.locating import check_source
from .asking import Overwrite
from .common import app, load_libraries, show, show_json


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="The file, or the directory that contains it.")],
    output: Annotated[Path, typer.Argument(help="Directory for the adapter; a failure writes nothing.")],
    base: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Base model for the adapter to name. A directory of a model or pipeline also helps to "
            "resolve flattened names.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Convert an adapter of diffusers or kohya's sd-scripts to PEFT's format.

    Every tensor is accounted for: if some cannot be read, they are listed and nothing is written. An adapter
    for several parts of a pipeline becomes one directory for each part.
    """
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
