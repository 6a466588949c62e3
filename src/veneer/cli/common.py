"""What the commands share: the application, its errors, how sizes are written."""

from __future__ import annotations

import io
import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ..errors import VeneerError, VeneerWarning

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    name="veneer",
    help="LoRA for PyTorch, PEFT-compatible: train, ask, look into and merge adapters.",
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
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show tracebacks and warnings in full; goes with every command.")
    ] = False,
) -> None:
    """LoRA for PyTorch, PEFT-compatible: train, ask, look into and merge adapters."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What follows the program's name; ``sys.argv`` when None.

    Returns:
        The exit code.
    """
    from . import demo, generate, inspect, merge, train  # noqa: F401  registers the commands

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without × or … is no reason to fail
    given = list(sys.argv[1:] if arguments is None else arguments)
    words, verbose = _normalised(given)
    if not verbose:
        _calm_warnings()
    try:
        return _run(words)
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:
        # The reader of our output left (`veneer inspect … | head`): nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (VeneerError, OSError, MemoryError) as error:
        return _failed(str(error) or type(error).__name__, verbose)
    except Exception as error:
        words_of = str(error).strip() or "no message"
        return _failed(f"unexpected {type(error).__name__}: {words_of}\nThis is a bug in Veneer.", verbose)


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
            _say(f"error: {error.format_message()}\nSee: {path} --help")
            return USAGE
        raise
    if answer == INTERRUPTED:
        # Newer typer turns Ctrl-C into this answer, older into Abort.
        return _interrupted()
    return answer if isinstance(answer, int) else DONE


def _normalised(words: list[str]) -> tuple[list[str], bool]:
    """Flags with underscores written with dashes, and whether ``--verbose`` stands anywhere among them."""
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
    return out + rest, verbose


def _calm_warnings() -> None:
    """Veneer's own warnings as one line each; other libraries' not at all."""
    import warnings

    def show(message: Warning | str, category: type[Warning], *details: Any, **more: Any) -> None:
        if issubclass(category, VeneerWarning):
            _say(f"warning: {message}")

    warnings.showwarning = show


def _failed(message: str, verbose: bool) -> int:
    if verbose:
        traceback.print_exc()
    _say(f"error: {message}" + ("" if verbose else "\n(--verbose shows the traceback)" * ("bug" in message)))
    return FAILED


def _interrupted() -> int:
    _say("interrupted")
    return INTERRUPTED


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def show_json(content: object) -> None:
    """Print a result for programs."""
    print(json.dumps(content, indent=2))


def size(count: int) -> str:
    """Bytes as people read them."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count} bytes"
