"""The picture of a sweep: held-out loss over the learning rate, curves for each rank."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..training.plots import INK, save_figure
from .trial import short

#: What the axis shows: the first of these that the grid varies, or else its first option.
ALONG = ("learning_rate", "lora_r", "lora_alpha", "batch_size")
#: Of curves at the last comparison and those before it.
STYLES = ("-", "--", ":")


def picture(path: Path, found: Mapping[str, Any]) -> None:
    """Draw the configurations: mean over the seeds, whiskers from the lowest to the highest.

    A curve joins runs at the same step, one for each time that they were compared; marks at the end are full.

    Args:
        path: The PNG.
        found: What ``sweep.json`` holds.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    varied = [name for name, values in found["grid"].items() if len(values) > 1] or list(found["grid"])
    along = next((name for name in ALONG if name in varied), varied[0])
    values = found["grid"][along]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    place = {short(value): value if numbers else number for number, value in enumerate(values)}
    curves = _curves(found, [name for name in varied if name != along], along)
    last = max((rung for _, rung in curves), default=0)
    figure = Figure(figsize=(7.2, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    lines = list(dict.fromkeys(line for line, _ in curves))
    colors = {
        line: colormaps["viridis"](0.9 * number / max(len(lines) - 1, 1)) for number, line in enumerate(lines)
    }
    lowest = found["base"]
    for (line, rung), points in curves.items():
        color = colors[line]
        x = [place[value] for value in points]
        mean = [sum(losses) / len(losses) for losses in points.values()]
        lowest = min(lowest, *mean)
        ends = [[m - min(p), max(p) - m] for m, p in zip(mean, points.values(), strict=True)]
        axes.errorbar(
            x,
            mean,
            yerr=list(zip(*ends, strict=True)) if any(map(any, ends)) else None,
            linestyle=STYLES[last - rung],
            color=color,
            marker="o",
            markerfacecolor=color if rung == last else "white",
            capsize=3,
            linewidth=1.2,
        )
    for line in filter(None, lines):
        axes.plot([], [], "o", color=colors[line], label=line)
    unit = "example" if found["options"]["task"] == "seq-cls" else "token of the answer"
    axes.axhline(found["base"], color=INK, linewidth=0.8, label="base")
    for rung in range(last + 1) if last else ():
        entry = next(run["evaluations"][rung] for run in found["runs"] if len(run["evaluations"]) > rung)
        axes.plot([], [], STYLES[last - rung], color=INK, label=f"after step {entry['step']}")
    # A run that is lost is far above the base; in its scale, the others could not be told apart.
    top = axes.get_ylim()[1]
    room = found["base"] - lowest
    if room and top > found["base"] + room:
        axes.set_ylim(lowest - 0.1 * room, found["base"] + 0.5 * room)
    if numbers and min(values) > 0 and max(values) > 5 * min(values):
        axes.set_xscale("log")
    axes.set_xticks(list(place.values()), list(place))
    axes.minorticks_off()
    axes.set(xlabel=along, ylabel=f"held-out loss per {unit}")
    axes.legend(frameon=False, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def _curves(
    found: Mapping[str, Any], others: list[str], along: str
) -> dict[tuple[str, int], dict[str, list[float]]]:
    """(what a line stands for, which comparison) -> losses of the seeds by place on the axis."""
    curves: dict[tuple[str, int], dict[str, list[float]]] = {}
    for run in found["runs"]:
        line = ", ".join(f"{name}={short(run['values'][name])}" for name in others)
        for rung, entry in enumerate(run["evaluations"]):
            points = curves.setdefault((line, rung), {})
            points.setdefault(short(run["values"][along]), []).append(entry["loss"])
    return curves
