"""How pictures of benchmarks look: as those of training runs do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from veneer.training.plots import INK, PALE, STRONG, can_plot

#: The colour of each side.
COLOURS = {"veneer": STRONG, "PEFT": PALE, "base": INK}


@contextmanager
def picture(path: Path, title: str, xlabel: str = "", ylabel: str = "") -> Iterator[Any]:
    """Axes to draw on; written as a PNG afterwards. None, and nothing is written, without matplotlib."""
    if not can_plot():
        yield None
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    yield axes
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, color=INK, fontweight="bold")
    figure.savefig(path)
