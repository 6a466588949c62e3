"""Flags made of the fields of a dataclass of options, so that each option is declared in one place."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
import textwrap
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from ..training.options import RunOptions, TrainOptions, plain_type, read_yaml
from ..training.saved_adapter import read_adapter, with_adapter

Command = TypeVar("Command", bound=Callable[..., Any])
#: The headings of ``--help``, in this order.
GROUPS = ("Run", "Data", "Adapter", "Steps", "Memory", "Evaluation", "Output")


def with_flags(
    kind: type[TrainOptions], without: Collection[str] = (), only: Collection[str] | None = None
) -> Callable[[Command], Command]:
    """Give a function with ``**given`` a flag for each field; a flag that is not used arrives as None.

    Args:
        kind: The options.
        without: Fields that get no flag.
        only: Fields that get one; all by default.
    """

    def decorate(function: Command) -> Command:
        types = get_type_hints(kind)
        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(function, eval_str=True).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        parts = sorted(dataclasses.fields(kind), key=lambda part: GROUPS.index(part.metadata["group"]))
        chosen = (part for part in parts if part.name not in without and (only is None or part.name in only))
        flags = [_flag(part, types[part.name]) for part in chosen]
        told: Any = function
        # Arguments, then the fields, then what only the command has: the order of --help.
        told.__signature__ = inspect.Signature([*own[:1], *flags, *own[1:]])
        told.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *flags)}
        return function

    return decorate


def _flag(part: dataclasses.Field[Any], kind: Any) -> inspect.Parameter:
    plain = plain_type(kind)
    names = [_dashed(name) for name in (part.name, *part.metadata["names"])]
    if plain is bool and not part.metadata["free"]:  # so that a flag can undo what a YAML file says
        names = [f"{name}/--no-{name[2:]}" for name in names]
    unset = plain is bool or part.default in (None, "")
    option = typer.Option(
        *names,
        help=part.metadata["help"] + ("" if unset else f" Default: {part.default}."),
        rich_help_panel=part.metadata["group"],
        show_default=False,
    )
    return inspect.Parameter(
        part.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[plain | None, option]
    )


def _dashed(name: str) -> str:
    return "--" + name.replace("_", "-")


def options_of(kind: type[RunOptions], config: Path | None, given: Mapping[str, Any]) -> Any:
    """The options: defaults, over them the YAML file, over that the flags.

    Raises:
        ConfigError: What the file or the flags give cannot be right, or contradicts the adapter that is to
            be trained further.
        AdapterFileError: That adapter is missing, broken, or no LoRA.
    """
    found = {} if config is None else read_yaml(config, kind)
    found |= {name: value for name, value in given.items() if value is not None}
    options = kind(**found)
    if not options.resume_from_adapter:
        return options
    return with_adapter(options, read_adapter(options.resume_from_adapter), given=found)


def commented(options: TrainOptions) -> str:
    """All options as YAML that `read_yaml` takes, each below what it does."""
    import yaml

    parts = dataclasses.fields(options)
    lines = []
    for group in GROUPS:
        lines.append(f"# ==== {group} ====\n")
        for part in (part for part in parts if part.metadata["group"] == group):
            value = yaml.safe_dump({part.name: getattr(options, part.name)}, allow_unicode=True)
            help = textwrap.fill(part.metadata["help"], 100, initial_indent="# ", subsequent_indent="# ")
            lines.append(f"{help}\n{value}")
    return "\n".join(lines)


def command_line(command: str, config: Path | None, given: Mapping[str, Any], *more: str) -> str:
    """What to type for these flags."""
    words = ["veneer", command, *([] if config is None else [str(config)])]
    for name, value in given.items():
        if isinstance(value, bool):
            words.append(_dashed(name) if value else f"--no-{name.replace('_', '-')}")
        elif value is not None:
            for one in value if isinstance(value, list) else [value]:
                words += [_dashed(name), str(one)]
    return shlex.join([*words, *more])
