"""``veneer diff``: what two adapters share, and where they differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..tools.requests import check_size
from ..training.progress import Terminal
from ..training.saved_adapter import read_adapter
from ..wording import listed
from .asking import AsJson, ListModules
from .common import app, by_kind, console, load_libraries, show, show_json, table

if TYPE_CHECKING:
    from ..tools import AdapterDifference


@app.command()
def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="Directory or hub id of an adapter.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Directory or hub id of another one.")],
    energy: Annotated[
        float, typer.Option(help="The directions compared hold this share of the energy of each update.")
    ] = 0.99,
    modules: ListModules = False,
    as_json: AsJson = False,
) -> None:
    """Compare two adapters: options, tensors, and for each module how far apart the updates are.

    Reads the adapters' files and loads no model. The distance is the norm of the difference of two updates in
    units of the larger one: 0 for equal ones, 2 for opposite ones. Shared is the mean squared cosine of the
    principal angles between the inputs that two updates read, and between the outputs that they write: 1
    where one has all directions of the other; "by chance" is what random directions share.
    """
    check_size(None, energy)
    progress = Terminal()
    saved = [read_adapter(name, progress) for name in (first, second)]
    load_libraries("torch")
    from ..tools import compare_adapters

    with progress.waiting("Comparing"):
        found = compare_adapters(saved[0].directory, saved[1].directory, energy=energy)
    if as_json:
        show_json({"a": first, "b": second, **asdict(found), "same_updates": found.same_updates})
        return
    _show(found, modules)


def _show(found: AdapterDifference, every: bool) -> None:
    for name, (one, two) in found.options.items():
        show(f"{name}: {_value(one)} | {_value(two)}")
    show(f"tensors: {found.tensors[0]} | {found.tensors[1]}, of which {found.identical} are the same")
    for label, paths in zip(("only in A", "only in B"), found.only, strict=True):
        if paths:
            show(f"{label}: {len(paths)} modules ({listed(paths)})")
    for path, (one, two) in found.shapes.items():
        show(f"{path}: updates of {'×'.join(map(str, one))} | {'×'.join(map(str, two))}")
    if found.others:
        show(f"other tensors that are not the same: {listed(found.others)}")
    for note in found.notes:
        show(f"note: {note}")
    show()
    if found.modules:
        _table(found, every)
    show(_in_words(found))


def _table(found: AdapterDifference, every: bool) -> None:
    shown = table(
        "module", "count", "norm A", "norm B", "distance", "cosine", "inputs\nshared", "outputs\nshared",
        "by\nchance",
    )  # fmt: skip
    for kind, paths in by_kind(found.modules, every).items():
        own = [found.modules[path] for path in paths]
        inputs, outputs = (
            [getattr(m, side) for m in own if getattr(m, side)] for side in ("inputs", "outputs")
        )
        shown.add_row(
            kind,
            str(len(own)),
            *(f"{_mean(m.norms[side] for m in own):#.3g}" for side in (0, 1)),
            f"{_mean(m.distance for m in own):.2f}",
            f"{_mean(m.cosine for m in own if m.cosine is not None):.2f}",
            *(
                f"{_mean(angles.shared for angles in sides):.0%}" if sides else ""
                for sides in (inputs, outputs)
            ),
            f"{_mean(angles.chance for angles in inputs + outputs):.0%}" if inputs else "",
        )
    console().print(shown)
    show()


def _in_words(found: AdapterDifference) -> str:
    if found.same_updates:
        return "Both change every weight in the same way."
    if not found.modules:
        return "There is no module that both adapt."
    furthest = max(found.modules, key=lambda path: found.modules[path].distance)
    apart = sum(module.distance > 0 for module in found.modules.values())
    return (
        f"{apart} of {len(found.modules)} updates of modules that both adapt differ, "
        f"most {furthest} ({found.modules[furthest].distance:.2f})"
    )


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return listed([f"{name}: {one}" for name, one in value.items()]) or "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _mean(values: Iterator[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0
