"""Flags that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import VeneerError

if TYPE_CHECKING:
    from ..training.saved_adapter import SavedAdapter

Adapter = Annotated[str, typer.Argument(help="Directory or hub id of the adapter.")]
Model = Annotated[
    str | None, typer.Option(help="Base model to use instead of the one that the adapter names.")
]
DoSample = Annotated[
    bool | None,
    typer.Option(
        "--do-sample/--no-do-sample",
        show_default=False,
        help="Sample instead of taking the most likely token; the next three flags turn it on as well.",
    ),
]
Temperature = Annotated[
    float | None, typer.Option(help="Divides the logits before sampling; 0 takes the most likely token.")
]
TopP = Annotated[
    float | None, typer.Option(help="Sample from the most likely tokens that make up this share.")
]
TopK = Annotated[int | None, typer.Option(help="Sample from this many of the most likely tokens.")]
Penalty = Annotated[float | None, typer.Option(help="Above 1 discourages repetition.")]
Seed = Annotated[int, typer.Option(help="Seed for sampling.")]
Dtype = Annotated[str, typer.Option(help="Type of the base: auto (as saved), float32, bfloat16 or float16.")]
Device = Annotated[
    str,
    typer.Option(
        help="cpu, cuda, cuda:1, mps, …; auto takes the GPU if there is one, and spreads a base that is too "
        "large for it."
    ),
]
Quantize = Annotated[
    str,
    typer.Option(help="Quantise the base: nf4, fp4, int8 or int4; none: as saved; auto: as in training."),
]
Attention = Annotated[
    str | None,
    typer.Option(
        "--attn-implementation", help="eager, sdpa, flash_attention_2, …; by default transformers chooses."
    ),
]
NewAdapter = Annotated[Path, typer.Option(help="Directory for the new adapter; a failure writes nothing.")]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite-output-dir", help="Replace the adapter in a directory that is not empty."),
]
Energy = Annotated[
    float | None,
    typer.Option(help="Give each module the smallest rank that keeps this share of its update, as 0.99."),
]
ListModules = Annotated[
    bool, typer.Option("--modules", help="List every module, not only the kinds of modules.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def require_language_model(saved: SavedAdapter) -> None:
    """Raise unless an adapter belongs to a model that writes text.

    Raises:
        VeneerError: Names the task of the model, and the command for it.
    """
    if saved.task != "CAUSAL_LM":
        what = "a classifier, which names classes" if saved.task == "SEQ_CLS" else f"the task {saved.task}"
        way = f": veneer eval {saved.name} --data FILE measures it" if saved.task == "SEQ_CLS" else ""
        raise VeneerError(f"{saved.name} is an adapter of {what}, and writes no text{way}")
