"""Flags that several commands share."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ..errors import VeneerError
from ..training.loading import Loading
from ..training.sampling import Sampling

if TYPE_CHECKING:
    from ..training.saved_adapter import SavedAdapter

Command = TypeVar("Command", bound=Callable[..., Any])

Adapter = Annotated[str, typer.Argument(help="Directory or hub id of the adapter.")]
Model = Annotated[
    str | None, typer.Option(help="Base model to use instead of the one that the adapter names.")
]
Seed = Annotated[int, typer.Option(help="Seed for sampling.")]
Device = Annotated[
    str,
    typer.Option(
        help="cpu, cuda, cuda:1, mps, …; auto takes the GPU if there is one, and spreads a base that is too "
        "large for it."
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

#: The flags of `Loading` and `Sampling`, by the names of their fields.
_FLAGS = {
    "dtype": Annotated[
        str, typer.Option(help="Type of the base: auto (as saved), float32, bfloat16 or float16.")
    ],
    "device": Device,
    "quantize": Annotated[
        str,
        typer.Option(help="Quantise the base: nf4, fp4, int8 or int4; none: as saved; auto: as in training."),
    ],
    "attn_implementation": Annotated[
        str | None, typer.Option(help="eager, sdpa, flash_attention_2, …; by default transformers chooses.")
    ],
    "max_new_tokens": Annotated[int, typer.Option(help="Maximum length of an answer, in tokens.")],
    "do_sample": Annotated[
        bool | None,
        typer.Option(
            "--do-sample/--no-do-sample",
            show_default=False,
            help="Sample instead of taking the most likely token; the next three flags turn it on as well.",
        ),
    ],
    "temperature": Annotated[
        float | None, typer.Option(help="Divides the logits before sampling; 0 takes the most likely token.")
    ],
    "top_p": Annotated[
        float | None, typer.Option(help="Sample from the most likely tokens that make up this share.")
    ],
    "top_k": Annotated[int | None, typer.Option(help="Sample from this many of the most likely tokens.")],
    "repetition_penalty": Annotated[float | None, typer.Option(help="Above 1 discourages repetition.")],
}


def in_flags(command: Command) -> Command:
    """A command with a flag for each field of its parameters that default to a `Loading` or a `Sampling`."""
    signature = inspect.signature(command, eval_str=True)
    parts = {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if isinstance(parameter.default, Loading | Sampling)
    }

    @functools.wraps(command)
    def asked(**given: Any) -> Any:
        for name, part in parts.items():
            own = {field.name: given.pop(field.name) for field in dataclasses.fields(part)}
            given[name] = dataclasses.replace(part, **own)
        return command(**given)

    flags: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        if (part := parts.get(parameter.name)) is None:
            flags.append(parameter)
        else:
            flags += [
                parameter.replace(name=name, default=value, annotation=_FLAGS[name])
                for name, value in dataclasses.asdict(part).items()
            ]
    told: Any = asked
    told.__signature__ = signature.replace(parameters=flags)
    told.__annotations__ = {flag.name: flag.annotation for flag in flags}
    return told  # type: ignore[no-any-return]


def require_language_model(saved: SavedAdapter) -> None:
    """Raise unless an adapter belongs to a model that writes text.

    Raises:
        VeneerError: Names the task of the model, and the command for it.
    """
    if saved.task != "CAUSAL_LM":
        what = "a classifier, which names classes" if saved.task == "SEQ_CLS" else f"the task {saved.task}"
        way = f": veneer eval {saved.name} --data FILE measures it" if saved.task == "SEQ_CLS" else ""
        raise VeneerError(f"{saved.name} is an adapter of {what}, and writes no text{way}")
