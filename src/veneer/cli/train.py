"""``veneer train``: fine-tune a language model with an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import VeneerError
from ..training.launcher import is_first, launched
from ..training.options import RunOptions
from ..training.paths import check_run
from ..training.progress import Terminal
from ..training.stopping import Interrupted
from .common import FAILED, INTERRUPTED, app, load_libraries, show, show_json, show_text, show_written
from .fields import command_line, commented, options_of, with_flags
from .messages import say

#: What the template of a configuration has for options without a default.
EXAMPLE = {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "data": "train.jsonl", "output": "my-adapter"}


@app.command()
@with_flags(RunOptions)
def train(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG.yaml]", help="Options by name, one per line; flags override them."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the metrics as JSON.", rich_help_panel="Output")
    ] = False,
    print_config: Annotated[
        bool,
        typer.Option(
            "--print-config",
            help="Print all options as commented YAML and exit; without other flags, a template.",
            rich_help_panel="Output",
        ),
    ] = False,
    **given: Any,
) -> int | None:
    """Fine-tune a language model with an adapter; the loss is computed on the answers only.

    Ctrl-C finishes the step, saves a checkpoint and shows how to continue. Works under torchrun and
    accelerate launch.
    """
    if print_config and config is None and all(value is None for value in given.values()):
        given = EXAMPLE
    options = options_of(RunOptions, config, given)
    if print_config:
        show_text(commented(options), end="")
        return None
    first = is_first()
    try:
        check_run(options)
        load_libraries("torch", "transformers")
        from ..training.run import fine_tune

        metrics = fine_tune(options, Terminal())
    except Interrupted as left:
        if first:
            _say_how_to_go_on(left, config, given)
        return INTERRUPTED
    except VeneerError:
        if first:
            raise
        return FAILED  # the first process fails of the same, and says so
    if not first:
        return None
    if as_json:
        show_json(metrics)
        return None
    output = Path(options.output)
    losses = [entry["loss"] for entry in metrics["losses"]]
    show(f"{metrics['steps']} steps in {metrics['seconds']:.0f} s, loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    if held_out := [entry["loss"] for entry in metrics["evaluations"]]:
        show(f"held-out loss {held_out[0]:.3f} -> {held_out[-1]:.3f}")
    show_written(output)
    return None


def _say_how_to_go_on(left: Any, config: Path | None, given: dict[str, Any]) -> None:
    way = ", under the same launcher" if launched() else ""
    say(f"Stopped after step {left.step} of {left.steps}; checkpoint: {left.checkpoint}. To continue{way}:")
    same = {name: value for name, value in given.items() if name not in ("resume", "overwrite_output_dir")}
    say(f"  {command_line('train', config, same, '--resume')}")
