"""``veneer inspect``: what an adapter is and what it learned, from its files alone."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..files.overwrite import check_writable
from ..training.libraries import require
from ..training.progress import Terminal
from ..training.saved_adapter import read_adapter
from ..wording import size
from .asking import Adapter, ListModules
from .common import app, load_libraries, show, show_json, table
from .common import console as stdout

if TYPE_CHECKING:
    from rich.console import Console

    from ..lora_file import OpenLora
    from ..training.spectra import UpdateSpectrum


@app.command()
def inspect(
    adapter: Adapter,
    spectrum: Annotated[
        bool, typer.Option(help="Compute the spectrum of each update; without it only headers are read.")
    ] = True,
    first: Annotated[
        int, typer.Option(min=1, help="Number of leading directions whose share of the energy is shown.")
    ] = 4,
    modules: ListModules = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw norm and effective rank by layer and module type: .png, .svg or .pdf."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON, with all values.")
    ] = False,
) -> None:
    """Show base, ranks, scaling, targets and size of an adapter, and the spectrum of its updates.

    Reads the adapter's files and loads no model. Norms are Frobenius norms of the scaled update;
    the effective rank is the exponential of the entropy of its singular values.
    """
    if plot is not None:
        _check_plot(plot)
    saved = read_adapter(adapter, Terminal())
    load_libraries("torch")
    from ..lora_file import open_lora
    from ..training.adapters import describe

    lora = open_lora(saved.directory, ambiguous=True)
    found = describe(lora)
    updates = _spectra(lora) if spectrum or modules or plot is not None else []
    if plot is not None:
        from ..training.heat_map import heat_map

        base = Path(found["base"] or "an unnamed base").name
        ranks = ", ".join(map(str, found["ranks"]))
        heat_map(plot, updates, f"{Path(adapter).name or adapter}: updates of rank {ranks} on {base}")
    if as_json:
        from ..training.spectra import as_json as plain

        show_json({**found, "plot": str(plot) if plot else None, "updates": list(plain(updates, first))})
        return
    _show(found, updates, first, modules)
    if plot is not None:
        show(f"picture: {plot}")


def _check_plot(plot: Path) -> None:
    require("matplotlib", "plots", "drawing a picture")
    if plot.suffix not in (".png", ".svg", ".pdf"):
        raise typer.BadParameter(f"--plot writes .png, .svg or .pdf, not {plot.name!r}")
    if not plot.absolute().parent.is_dir():
        raise typer.BadParameter(f"--plot: there is no directory {plot.parent}")
    check_writable(plot.parent)


def _spectra(lora: OpenLora) -> list[UpdateSpectrum]:
    from ..training.spectra import spectra

    progress = Terminal()
    if not progress.console.is_terminal:
        return spectra(lora)
    with progress.console.status("computing spectra …") as status:
        return spectra(lora, lambda done, total: status.update(f"computing spectra {done}/{total}"))


def _show(found: dict[str, Any], updates: list[UpdateSpectrum], first: int, modules: bool) -> None:
    console = stdout()
    targets = found["target_modules"]
    lines = {
        "adapter": found["path"],
        "base": found["base"] or "not named",
        "task": found["task_type"] or "not named",
        "targets": targets if isinstance(targets, str) else ", ".join(targets or ()) or "not named",
        "rank": ", ".join(map(str, found["ranks"])),
        "alpha": ", ".join(f"{a:g}" for a in found["alphas"]),
        "scaling": ", ".join(f"{s:g}" for s in found["scalings"])
        + (" (alpha / √r)" if found["use_rslora"] else " (alpha / r)"),
        "parameters": f"{found['parameters']:,} in {found['layers']} modules",
        "size": f"{size(found['bytes'])} ({', '.join(found['dtypes'])})",
    }
    if found["variant"] != "plain":
        lines["variant"] = found["variant"] + (", shown before its magnitudes" if updates else "")
    if experts := found["experts"]:
        names = " or ".join([experts["layout"], *experts["may_be"]])
        lines["experts"] = f"in the layout {names}: {experts['why']}"
    if found["modules_to_save"]:
        lines["saved whole"] = ", ".join(found["modules_to_save"])
    for name, value in lines.items():
        console.print(f"{name:<11} {value}", soft_wrap=True)
    console.print()
    _kinds(console, found, updates, first)
    if modules:
        _every_module(console, updates, first)
    if updates:
        _in_words(console, updates, first)


def _kinds(console: Console, found: dict[str, Any], updates: list[UpdateSpectrum], first: int) -> None:
    shown = table("module", "count", "A", "B", "parameters")
    if updates:
        shown = table(
            "module", "count", "update", "parameters", "norm", "effective\nrank", f"in first\n{first}"
        )
    for row in found["modules"]:
        shapes = ["×".join(map(str, row[key])) for key in ("A", "B")]
        count, parameters = str(row["count"]), f"{row['parameters']:,}"
        # Modules of one name may differ in shape and stand in several rows.
        own = [u for u in updates if u.path in row["paths"]]
        if not own:
            shown.add_row(row["module"], count, *shapes, parameters)
            continue
        numbers = [
            f"{_mean([u.norm for u in own]):#.3g}",
            f"{_mean([u.effective_rank for u in own]):.1f}",
            f"{_mean([u.energy(first) for u in own]):.0%}",
        ]
        shown.add_row(row["module"], count, "×".join(map(str, own[0].shape)), parameters, *numbers)
    console.print(shown)
    if found["others"]:
        console.print(f"and {len(found['others'])} more tensors, e.g. {found['others'][0]}")
    console.print()


def _every_module(console: Console, updates: list[UpdateSpectrum], first: int) -> None:
    same = len({u.r for u in updates}) == 1
    shown = table(
        "module",
        *([] if same else ["rank"]),
        "norm",
        "σ₁",
        "stable\nrank",
        "effective\nrank",
        f"in first\n{first}",
    )
    for u in updates:
        cells = [] if same else [str(u.r)]
        cells += [f"{u.norm:#.3g}", f"{u.largest:#.3g}", f"{u.stable_rank:.1f}", f"{u.effective_rank:.1f}"]
        shown.add_row(u.path, *cells, f"{u.energy(first):.0%}")
    console.print(shown)
    console.print()


def _in_words(console: Console, updates: list[UpdateSpectrum], first: int) -> None:
    alive = [u for u in updates if u.norm > 0]
    if len(alive) < len(updates):
        silent = [u.path for u in updates if not u.norm]
        console.print(
            f"{len(silent)} of {len(updates)} updates are zero and change nothing, e.g. {silent[0]}",
            soft_wrap=True,
        )
    if not alive:
        return
    needed = sorted(u.needed() for u in alive)
    least, most = needed[0], needed[-1]
    strongest = max(alive, key=lambda u: u.norm)
    share = f"{_mean([u.energy(first) for u in alive]):.0%}"
    hold = f"{first} directions hold" if first > 1 else "direction holds"
    console.print(
        f"Norms from {min(u.norm for u in alive):.3g} to {strongest.norm:.3g} ({strongest.path}).",
        soft_wrap=True,
    )
    console.print(
        f"The first {hold} {share} of the energy of "
        f"an update on average; 99% of it takes {least} to {most}, in the median {median(needed):g}.",
        soft_wrap=True,
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
