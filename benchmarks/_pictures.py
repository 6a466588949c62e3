"""How pictures of benchmarks look: as those of training runs do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness import Figure
from veneer.training.plots import INK, PALE, STRONG, can_plot

#: The colour of each side.
COLOURS = {"veneer": STRONG, "Veneer": STRONG, "PEFT": PALE, "base": INK}


@contextmanager
def picture(path: Path, title: str, xlabel: str = "", ylabel: str = "") -> Iterator[Any]:
    """Axes to draw on; written as a PNG afterwards. None, and nothing is written, without matplotlib."""
    if not can_plot():
        yield None
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    yield axes
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, color=INK, fontweight="bold")
    figure.savefig(path)


def bars(
    path: Path, groups: Mapping[str, Mapping[str, Figure]], title: str, *, floor: float | None = None
) -> None:
    """Groups of bars, a bar for each side with its quartiles as a whisker, and a line at the floor."""
    with picture(path, title) as axes:
        if axes is None:
            return
        sides = list(dict.fromkeys(side for figures in groups.values() for side in figures))
        width = 0.8 / len(sides)
        for number, side in enumerate(sides):
            shown = [(x, f[side]) for x, f in enumerate(groups.values()) if side in f]
            places = [x + (number - (len(sides) - 1) / 2) * width for x, _ in shown]
            spread = [[f.median - f.low for _, f in shown], [f.high - f.median for _, f in shown]]
            values = [f.median for _, f in shown]
            colour = COLOURS.get(side, "#8fa3ad")
            drawn = axes.bar(
                places, values, width * 0.92, yerr=spread, color=colour, ecolor=INK, capsize=1.5, label=side
            )
            axes.bar_label(drawn, [f"{value:.2f}" for value in values], padding=2, fontsize=6)
        if floor is not None:
            axes.axhline(floor, color=INK, linewidth=0.8, linestyle=":")
        labels = [label.replace(", ", ",\n") for label in groups]
        axes.set_xticks(range(len(groups)), labels, fontsize=6.5)
        axes.legend(frameon=False, ncols=len(sides), fontsize=7, loc="upper left")
        axes.set_ylim(0, axes.get_ylim()[1] * 1.12)
