"""The picture of a sweep: held-out loss over the learning rate, a line for each rank."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..training.plots import INK, save_figure
from .trial import short

#: What is drawn along the axis and what makes the lines, the first that the grid varies.
ALONG = ("learning_rate", "lora_r", "lora_alpha", "batch_size")


def picture(path: Path, found: Mapping[str, Any]) -> None:
    """Draw the configurations: mean over the seeds, whiskers from the lowest to the highest.

    Hollow marks are of runs that were stopped early, at the loss that they had then.

    Args:
        path: The PNG.
        found: What ``sweep.json`` holds.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    varied = [name for name, values in found["grid"].items() if len(values) > 1] or list(found["grid"])
    along = next((name for name in ALONG if name in varied), varied[0])
    values = found["grid"][along]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    place = {short(value): value if numbers else number for number, value in enumerate(values)}
    lines: dict[str, list[dict[str, Any]]] = {}
    for one in found["configurations"]:
        rest = ", ".join(f"{name}={short(one['values'][name])}" for name in varied if name != along)
        if one["losses"]:
            lines.setdefault(rest, []).append(one)
    figure = Figure(figsize=(7.2, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    from matplotlib import colormaps

    shades = colormaps["viridis"]
    ordered = [name for name in _in_order(found["grid"], varied, along) if name in lines]
    for number, name in enumerate(ordered):
        color = shades(0.9 * number / max(len(ordered) - 1, 1))
        _line(axes, lines[name], lambda one: place[short(one["values"][along])], color, name)
    if numbers and min(values) > 0 and max(values) > 5 * min(values):
        axes.set_xscale("log")
    axes.set_xticks(list(place.values()), list(place))
    axes.minorticks_off()
    if any(one["state"] == "stopped" for one in found["configurations"]):
        axes.plot([], [], "o", color=INK, markerfacecolor="none", linestyle="none", label="stopped early")
    axes.axhline(found["base"], color=INK, linewidth=0.8, linestyle=":", label="base")
    axes.set(xlabel=along, ylabel="held-out loss per token of the answer")
    axes.legend(frameon=False, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def _in_order(grid: Mapping[str, Any], varied: list[str], along: str) -> list[str]:
    names = [""]
    for name in varied:
        if name != along:
            names = [
                f"{first}{', ' * bool(first)}{name}={short(value)}" for first in names for value in grid[name]
            ]
    return names


def _line(axes: Any, configurations: list[dict[str, Any]], where: Any, color: Any, label: str) -> None:
    """One line through the runs that came to the end, and marks for all."""
    points = []
    for one in sorted(configurations, key=where):
        mean = sum(one["losses"]) / len(one["losses"])
        whiskers = [[mean - min(one["losses"])], [max(one["losses"]) - mean]]
        axes.errorbar(
            where(one),
            mean,
            yerr=whiskers if len(one["losses"]) > 1 else None,
            marker="o",
            color=color,
            markerfacecolor=color if one["state"] == "done" else "none",
            capsize=3,
            linewidth=1,
        )
        points.append((where(one), mean))
    axes.plot(*zip(*points, strict=True), color=color, linewidth=1.2, alpha=0.6, label=label or None)
