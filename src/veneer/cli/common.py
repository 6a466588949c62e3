"""What the commands share: the application, error handling, and output."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import io
import json
import os
import pkgutil
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, VeneerError
from ..files.layout import SAFETENSORS_NAME
from ..wording import size, span, visible
from . import messages
from .messages import Flag, say

if TYPE_CHECKING:
    from rich.table import Table

    from ..training.console import PlainConsole

#: Flags whose value may be left out, and what it is then.
ALONE = {"--ray": "local"}
DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    name="veneer",
    help="LoRA for PyTorch, PEFT-compatible: train, use, inspect, merge and export adapters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"veneer {version('veneer')}")
        except PackageNotFoundError:
            print("veneer (not installed)")
        raise typer.Exit


@app.callback()
def _veneer(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show tracebacks and all warnings; works with every command.")
    ] = False,
) -> None:
    """LoRA for PyTorch, PEFT-compatible: train, use, inspect, merge and export adapters."""


def register_commands(named: str | None = None) -> None:
    """Import the files of this folder: a file with ``@app.command()`` in it is a command.

    Args:
        named: Import the file of this command alone, if there is one; None imports all of them.
    """
    package = sys.modules[__package__ or "veneer.cli"]
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    own = [name for name in names if name in (named, f"{named}_")]  # `import` is no name for a module
    for name in own or names:
        importlib.import_module(f"{package.__name__}.{name}")
    for command in app.registered_commands:  # rich would keep the line breaks of the source
        text = inspect.cleandoc(command.help or getattr(command.callback, "__doc__", None) or "")
        command.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What follows the program's name; ``sys.argv`` when None.

    Returns:
        The exit code.
    """
    words, verbose = _normalised(list(sys.argv[1:] if arguments is None else arguments))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # do not fail at a terminal without × or …
    if not verbose:
        messages.quieten(lambda: flags_of(words[0]) if words else {})
    try:
        register_commands(next((word for word in words if not word.startswith("-")), None))
        code = _run(words)
        sys.stdout.flush()  # errors of a full disk or a closed pipe appear here at the latest
        return code
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:
        # The reader of our output has exited (`veneer inspect … | head`): not an error.
        _drop_output()
        return DONE
    except SystemExit as leaving:
        if isinstance(leaving.__context__, BrokenPipeError):  # rich makes this of it
            return DONE
        raise
    except Exception as error:
        if messages.was_interrupted(error):
            return _interrupted()
        return _failed(error, words, verbose)


def _run(words: list[str]) -> int:
    try:
        answer = app(args=words, prog_name="veneer", standalone_mode=False)
    except typer.Exit as leaving:
        return int(leaving.exit_code)
    except typer.Abort:
        return _interrupted()
    except Exception as error:
        # The parser's own errors, whichever copy of click it uses: they know how to show themselves.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            context = getattr(error, "ctx", None)
            path = context.command_path if context is not None else "veneer"
            if type(error).__name__ == "NoArgsIsHelpError":
                print(error.format_message())
                return USAGE
            say(f"error: {error.format_message()}\nSee: {path} --help")
            return USAGE
        raise
    if answer == INTERRUPTED:
        # Newer typer returns this after Ctrl-C, older raises Abort.
        return _interrupted()
    return answer if isinstance(answer, int) else DONE


def _normalised(words: list[str]) -> tuple[list[str], bool]:
    """The arguments with dashes instead of underscores in flags, and whether ``--verbose`` is among them."""
    end = words.index("--") if "--" in words else len(words)
    flags, rest = words[:end], words[end:]
    verbose = "--verbose" in flags
    out = []
    for word in flags:
        if word == "--verbose":
            continue
        if word.startswith("--"):
            name, sign, value = word.partition("=")
            word = name.replace("_", "-") + sign + value
        out.append(word)
    for number, (word, after) in enumerate(pairwise([*out, "-"])):
        if word in ALONE and after.startswith("-"):
            out[number] = f"{word}={ALONE[word]}"
    return out + rest, verbose


def _failed(error: Exception, words: list[str], verbose: bool) -> int:
    if verbose:
        traceback.print_exc()
    system = messages.of_system(error)
    if system is not None:
        if isinstance(error, OSError):
            _drop_output(only_if_broken=True)
        message = system
    elif isinstance(error, VeneerError):
        message = messages.in_flags(error.message, flags_of(words[0]) if words else {})
    else:
        message = messages.unexpected(error)
    say("error: " + (message or type(error).__name__))
    if isinstance(error, ConfigError):
        # Adapter files have errors of their own; this one is about the command line.
        say(f"See: veneer {words[0]} --help")
        return USAGE
    return FAILED


def _interrupted() -> int:
    say("interrupted")
    return INTERRUPTED


def _drop_output(only_if_broken: bool = False) -> None:
    """Discard the rest of the standard output, so that exiting raises no further error."""
    try:
        if only_if_broken:
            sys.stdout.flush()
            return
    except OSError:
        pass
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@functools.cache
def flags_of(command: str) -> dict[str, Flag]:
    """The flag of each option, by its parameter's name and by each of its flags; empty without a command."""
    group: Any = typer.main.get_command(app)
    found = group.commands.get(command)
    flags: dict[str, Flag] = {}
    for parameter in found.params if found else ():
        names = [name for name in parameter.opts if name.startswith("--")]
        if names:
            flag = Flag(names[0], next(iter(parameter.secondary_opts), None), bool(parameter.is_flag))
            flags |= {name.removeprefix("--").replace("-", "_"): flag for name in names}
            flags[parameter.name] = flag
    return flags


def show_json(content: object) -> None:
    """Print a result; paths in it become strings."""
    print(json.dumps(content, indent=2, default=os.fspath))


def show_report(report: Any, **instead: object) -> None:
    """Print what a new adapter is: the fields of its report, some of them given anew."""
    fields = asdict(report)
    show_json({"output": fields.pop("directory"), **fields, **instead})


def load_libraries(*names: str) -> None:
    """Import libraries that take seconds to import, and say so.

    Every command first checks what it was given; nothing before this call may import one of them.
    """
    missing = [name for name in names if name not in sys.modules and importlib.util.find_spec(name)]
    if not missing:
        return
    from ..training.launcher import is_first
    from ..training.progress import Terminal

    with Terminal().waiting(f"Loading {' and '.join(missing)}") if is_first() else contextlib.nullcontext():
        for name in missing:
            importlib.import_module(name)


def show(line: str = "") -> None:
    print(visible(line), flush=True)


def show_text(text: str, end: str = "\n") -> None:
    """Print a text of several lines: unchanged into a file or a pipe, with escapes on a terminal."""
    print(visible(text, lines=True) if sys.stdout.isatty() else text, end=end, flush=True)


def console(piped: int = 1000) -> PlainConsole:
    """A console for tables; very wide without a terminal, so that programs read unwrapped lines."""
    from ..training.console import PlainConsole

    made = PlainConsole()
    return made if made.is_terminal else PlainConsole(width=piped)


def by_kind(paths: Iterable[str], every: bool = False) -> dict[str, list[str]]:
    """Paths of modules by their last name, as one table row each; by themselves with ``every``."""
    kinds: dict[str, list[str]] = {}
    for path in paths:
        kinds.setdefault(path if every else path.rpartition(".")[2], []).append(path)
    return kinds


def show_written(output: Path) -> None:
    """Where a new adapter is, and how large."""
    show(f"adapter ({size((output / SAFETENSORS_NAME).stat().st_size)}): {output}")


def show_errors(ranks: Mapping[str, int], errors: Mapping[str, float], every: bool = False) -> None:
    """A table of the ranks and errors of modules, by kind, or one by one with ``every``."""
    shown = table("module", "count", "rank", "error", "most")
    for kind, paths in by_kind(ranks, every).items():
        found, own = [ranks[path] for path in paths], [errors[path] for path in paths]
        mean = sum(own) / len(own)
        shown.add_row(kind, str(len(paths)), span(found), f"{mean:.2%}", f"{max(own):.2%}")
    console().print(shown)
    show()


def table(*columns: str) -> Table:
    """An empty table without lines: the first column left-aligned, numbers right-aligned."""
    from rich.table import Table

    from ..training.console import paragraphs

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for number, column in enumerate(columns):
        made.add_column(
            paragraphs(column), justify="right" if number else "left", overflow="fold", no_wrap=number == 0
        )
    return made
