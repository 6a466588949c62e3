"""``veneer inspect``: what an adapter is, from its files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import app, show_json, size


@app.command()
def inspect(
    adapter: Annotated[Path, typer.Argument(help="Directory of the adapter.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show base, ranks, scaling, targets, parameters and bytes; reads headers only, loads no model."""
    from ..training.adapters import describe

    found = describe(adapter)
    if as_json:
        show_json(found)
    else:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    lines = {
        "adapter": found["path"],
        "base": found["base"] or "not named",
        "task": found["task_type"] or "not named",
        "rank": ", ".join(map(str, found["ranks"])),
        "alpha": ", ".join(f"{a:g}" for a in found["alphas"]),
        "scaling": ", ".join(f"{s:g}" for s in found["scalings"]),
        "parameters": f"{found['parameters']:,}",
        "size": f"{size(found['bytes'])} ({', '.join(found['dtypes'])})",
    }
    for name, value in lines.items():
        console.print(f"{name:<11} {value}", markup=False, soft_wrap=True)
    table = Table()
    for column in ("module", "count", "shape of A", "shape of B", "parameters"):
        table.add_column(column, justify="left" if column == "module" else "right")
    for row in found["modules"]:
        shapes = [" × ".join(map(str, row[key])) for key in ("A", "B")]
        table.add_row(row["module"], str(row["count"]), *shapes, f"{row['parameters']:,}")
    console.print(table)
    if found["others"]:
        console.print(f"and {len(found['others'])} more tensors, e.g. {found['others'][0]}", markup=False)
