"""Pictures of a training run."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..atomic import atomic_file
from .progress import Progress

INK, PALE, STRONG = "#333333", "#b8bfc6", "#0b6e8a"


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


@contextlib.contextmanager
def said_if_not_written(progress: Progress) -> Iterator[None]:
    """Report a picture that cannot be written: the results beside it are whole."""
    try:
        yield
    except OSError as error:
        progress.say(f"warning: no picture: {error}")


def loss_picture(
    path: Path,
    losses: Sequence[float],
    title: str,
    held_out: Sequence[tuple[int, float]] = (),
    shares: Mapping[str, tuple[float, float]] | None = None,
    ylabel: str = "loss per token of the answer",
) -> None:
    """Write a PNG with the loss of each step and, beside it, shares before and after training.

    Args:
        path: The file to write.
        losses: Training loss, one a step.
        title: Headline.
        held_out: (step, held-out loss), step 0 being before the first; first and last get a label.
        shares: Name -> (before, after), each in [0, 1].
        ylabel: Label of the loss.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10 if shares else 6.4, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    columns = figure.subplots(1, 2, width_ratios=(3, 2)) if shares else [figure.subplots()]
    _curve(columns[0], losses, held_out)
    columns[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    columns[0].set(xlabel="step", ylabel=ylabel, ylim=(0, None))
    columns[0].legend(frameon=False)
    if shares:
        _bars(columns[1], shares)
    for axes in columns:
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, color=INK, fontweight="bold")
    save_figure(figure, path)


def _curve(axes: Any, losses: Sequence[float], held_out: Sequence[tuple[int, float]]) -> None:
    steps = range(1, len(losses) + 1)
    marker = "o" if len(losses) <= 60 else ""
    axes.plot(steps, losses, color=STRONG, marker=marker, markersize=4, label="training")
    if not held_out:
        return
    only_ends = len(held_out) == 2
    axes.plot(
        [step for step, _ in held_out],
        [loss for _, loss in held_out],
        "D" if only_ends else "D-",
        color=INK,
        markersize=7 if only_ends else 5,
        label="held-out, before and after" if only_ends else "held-out",
    )
    ends = (held_out[0], held_out[-1]) if len(held_out) > 1 else held_out
    for (x, y), side, gap in zip(ends, ("right", "left"), (-8, 8), strict=False):
        axes.annotate(f"{y:.3f}", (x, y), xytext=(gap, -4), textcoords="offset points", ha=side)
    room = 0.14 * len(losses)
    axes.set_xlim(-room, len(losses) + room)


def _bars(axes: Any, shares: Mapping[str, tuple[float, float]]) -> None:
    for offset, place, color, name in ((-0.2, 0, PALE, "before"), (0.2, 1, STRONG, "after")):
        values = [pair[place] for pair in shares.values()]
        drawn = axes.bar([x + offset for x in range(len(values))], values, 0.38, color=color, label=name)
        axes.bar_label(drawn, [f"{value:.0%}" for value in values], padding=2)
    axes.set_xticks(range(len(shares)), list(shares))
    axes.set(ylim=(0, 1.18), yticks=[])
    axes.spines["left"].set_visible(False)
    axes.legend(frameon=False, ncols=2, loc="upper left")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib atomically, in the format of the suffix, which matplotlib must know."""
    with atomic_file(path) as waiting:
        figure.savefig(waiting, format=path.suffix.removeprefix(".") or "png")
