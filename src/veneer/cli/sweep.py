"""``veneer sweep``: try a grid of options in one pass, and stop early what does not look good."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..sweep.options import LEFT_OUT, SweepOptions, check_sweep, options_and_grid
from ..training.progress import Terminal
from ..training.stopping import Interrupted
from .common import INTERRUPTED, app, console, load_libraries, show, show_json, table
from .fields import command_line, with_flags
from .messages import say


@app.command()
@with_flags(SweepOptions, without=LEFT_OUT)
def sweep(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG.yaml]", help="Options by name, and the grid; flags override them."),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE,VALUE",
            help="An option and the values to try; may be repeated. With semicolons between values, commas "
            "belong to them.",
            rich_help_panel="Run",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what sweep.json holds.", rich_help_panel="Output")
    ] = False,
    **given: Any,
) -> int | None:
    """Try a grid of options: all runs are trained in one pass, and compared on held-out examples.

    Takes the flags and the YAML file of veneer train. Ctrl-C finishes the step, saves and shows how to go on.
    """
    options, values = options_and_grid(config, given, grid or [])
    check_sweep(options)
    load_libraries("torch", "transformers")
    from ..sweep.results import BEST, rows
    from ..sweep.sweep import sweep as train

    try:
        found = train(options, values, Terminal())
    except Interrupted as left:
        done = f"{left.step:,} of at most {left.steps:,} steps"
        say(f"Stopped after {done}, saved in {left.checkpoint}. To go on:")
        same = {"grid": grid, **{name: value for name, value in given.items() if name != "resume"}}
        say(f"  {command_line('sweep', config, same, '--resume')}")
        return INTERRUPTED
    if as_json:
        show_json(found)
        return None
    header, *body = rows(found)
    shown = table(*header)
    for line in body:
        shown.add_row(*line)
    console().print(shown)
    share = found["examples"]["trained"] / found["examples"]["grid"]
    show(f"trained on {share:.0%} of the examples of the whole grid; base: held-out loss {found['base']:.3f}")
    spent = ((what, found["tokens"][what], seconds) for what, seconds in found["seconds"].items())
    show("; ".join(f"{what}: {tokens:,} tokens in {seconds:.0f} s" for what, tokens, seconds in spent))
    show(f"best: {found['best']} ({Path(options.output) / BEST})")
    return None
