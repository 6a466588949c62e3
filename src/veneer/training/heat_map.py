"""A heat map of an adapter's updates, by layer and kind of module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .plots import INK, save_figure
from .spectra import Grid, UpdateSpectrum, grid

PANELS: tuple[tuple[str, Callable[[UpdateSpectrum], float], str], ...] = (
    ("norm of the update", lambda update: update.norm, "%.2g"),
    ("effective rank", lambda update: update.effective_rank, "%.3g"),
)


def heat_map(path: Path, updates: Sequence[UpdateSpectrum], title: str) -> None:
    """Write a heat map of the norm and the effective rank of each update, with a column for each layer.

    Args:
        path: The file to write; its suffix names the format (.png, .svg, .pdf).
        updates: From `spectra`.
        title: Headline.

    Raises:
        ValueError: The suffix names no format that matplotlib writes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    grids = [grid(updates, value) for _, value, _ in PANELS]
    columns, rows = len(grids[0].layers), len(grids[0].kinds)
    widest = max(map(len, grids[0].kinds), default=0)
    width = min(4.0 + 0.075 * widest + 0.26 * columns, 24.0)
    height = 1.1 + len(PANELS) * (0.85 + 0.27 * rows)
    figure = Figure(figsize=(max(width, 6.0), min(height, 40.0)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    all_axes: Any = figure.subplots(len(PANELS), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (name, _, style), content in zip(all_axes, PANELS, grids, strict=True):
        _panel(figure, axes, name, style, content)
    all_axes[-1].set_xlabel(f"layer ({grids[0].before}.N)" if grids[0].before else "layer", color=INK)
    figure.suptitle(title, color=INK, fontweight="bold")
    save_figure(figure, path)


def _panel(figure: Any, axes: Any, name: str, style: str, content: Grid) -> None:
    rows = [[float("nan") if v is None else v for v in row] for row in content.values]
    # From zero: a faint update must look faint beside a strong one, and equal ones equal.
    largest = max((v for row in content.values for v in row if v is not None), default=0.0)
    image = axes.imshow(rows, aspect="auto", cmap="viridis", vmin=0.0, vmax=largest or 1.0)
    step = max(1, -(-len(content.layers) // 40))
    ticks = range(0, len(content.layers), step)
    long = any(len(content.layers[i]) > 3 for i in ticks)
    axes.set_xticks(list(ticks), [content.layers[i] for i in ticks], rotation=90 if long else 0)
    axes.set_yticks(range(len(content.kinds)), content.kinds)
    axes.tick_params(length=0, labelsize=8)
    axes.set_title(name, loc="left", fontsize=10, color=INK)
    axes.set_facecolor("#f0f0f0")
    for side in axes.spines.values():
        side.set_visible(False)
    bar = figure.colorbar(image, ax=axes, format=style, pad=0.015, fraction=0.05)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8)
