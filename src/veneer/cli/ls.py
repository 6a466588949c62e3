"""``veneer ls``: the adapters under a directory, from headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..wording import size
from .asking import AsJson
from .common import DONE, FAILED, app, show, show_json
from .common import console as stdout
from .messages import say

if TYPE_CHECKING:
    from ..listing import AdapterEntry

#: Columns of the output where no terminal says how many it has: nobody folds what a program reads.
PIPED = 200


@app.command()
def ls(
    directory: Annotated[Path, typer.Argument(help="Where to look, subdirectories included.")] = Path(),
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 if an adapter is broken.")] = False,
    as_json: AsJson = False,
) -> int:
    """List all adapters under a directory, from their headers: base, rank, targets, size, date, problems."""
    from ..listing import find_adapters

    found = find_adapters(directory)
    broken = [entry for entry in found if entry.problems]
    if as_json:
        show_json([entry.to_dict() for entry in found])
    elif found:
        _show(found, broken)
    else:
        say(f"no adapter in {directory} or below")
    return FAILED if check and broken else DONE


def _show(found: list[AdapterEntry], broken: list[AdapterEntry]) -> None:
    from rich.table import Table

    console = stdout(PIPED)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("adapter", "base", "r", "targets", "size", "date", ""):
        table.add_column(
            column,
            justify="right" if column in ("r", "size") else "left",
            no_wrap=column in ("r", "size", "date", ""),
            overflow="fold",
        )
    for entry in found:
        table.add_row(
            entry.path,
            (entry.base or "").replace("\\", "/").rstrip("/").rpartition("/")[2],
            ",".join(map(str, entry.ranks)),
            _short_targets(entry.target_modules),
            "" if entry.bytes is None else size(entry.bytes),
            (entry.modified or "")[:10],
            "broken" if entry.problems else "",  # the values were not read
        )
    console.print(table)
    for entry in broken:
        for problem in entry.problems:
            show(f"{entry.path}: {problem}")
    total = sum(entry.bytes or 0 for entry in found)
    end = f", {len(broken)} of them broken" if broken else ""
    show(f"{len(found)} adapter{'s' * (len(found) != 1)}, {size(total)}{end}")


def _short_targets(targets: str | tuple[str, ...] | None) -> str:
    if targets is None or isinstance(targets, str):
        text = targets or ""
        return text if len(text) <= 24 else text[:23] + "…"
    names = list(dict.fromkeys(target.rpartition(".")[2] for target in targets))
    return ", ".join(names[:2]) + (f" +{len(names) - 2}" if len(names) > 2 else "")
